"""Adapters as one: against the dense sum of their updates, against peft itself, and built into an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_store.build.adapters import AdapterError, load_adapter
from model_store.build.build import build_encoder
from model_store.build.combination import CombinationType, combine_adapters
from model_store.encoder.encoder import Encoder
from model_store.recipe import recipe_from
from service.cli import main
from tests.tiny import save_adapter, save_base, tiny_model

# What LoRA adapters may differ in: ranks and scales, as a whole and by module, and the modules themselves.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 6, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 5, "q_proj": 1},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "one layer": {"target_modules": ["layers.1.mlp.up_proj", "layers.1.self_attn.q_proj"], "r": 3},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(KINDS.items()):
        save_adapter(folder / name, tiny_model("llama"), seed, **options)
    return folder


def dense(folder: Path) -> dict[str, Tensor]:
    """Each weight's update, float64."""
    updates = load_adapter(folder, folder.name).updates
    return {name: each.scale * each.b.double() @ each.a.double() for name, each in updates.items()}


def weighted_sum(folder: Path, weights: dict[str, float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for weight_name, update in dense(folder / name).items():
            found[weight_name] = found.get(weight_name, torch.zeros(())) + weight * update
    return found


@pytest.mark.parametrize(
    ("way", "weights"),
    [
        ("cat", {"plain": 0.4, "rslora": 1.5, "patterns": -0.7, "one layer": 2.0}),
        ("svd", {"plain": 0.4, "rslora": 1.5, "patterns": -0.7, "one layer": 2.0}),
        ("cat", {"patterns": 0.25}),
        ("linear", {"rslora": 0.25}),
        ("linear", {"patterns": -0.25}),
    ],
)
def test_the_update_is_the_weighted_sum(
    adapters: Path, tmp_path: Path, way: CombinationType, weights: dict[str, float]
) -> None:
    """With svd, under a rank that loses nothing."""
    rank = 24 if way == "svd" else None
    found = combine_adapters(
        [str(adapters / name) for name in weights], list(weights.values()), tmp_path / "out", way, rank
    )
    assert found.error < 1e-6
    expected = weighted_sum(adapters, weights)
    combined = dense(tmp_path / "out")
    assert combined.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(combined[name], update, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["cat", "svd", "linear"])
def test_peft_makes_the_same_and_reads_it(adapters: Path, tmp_path: Path, way: CombinationType) -> None:
    save_adapter(tmp_path / "other", tiny_model("llama"), 9, lora_alpha=2)
    folders = {"default": adapters / "plain", "other": tmp_path / "other"}
    rank = 3 if way == "svd" else None
    found = combine_adapters([str(each) for each in folders.values()], [0.7, -0.3], tmp_path / "out", way, rank)
    assert found.rank == {"cat": 8, "svd": 3, "linear": 4}[way]
    assert (found.error < 1e-6) == (way == "cat")

    twin = PeftModel.from_pretrained(tiny_model("llama"), str(folders["default"]))
    twin.load_adapter(str(folders["other"]), "other")
    twin.add_weighted_adapter(["default", "other"], [0.7, -0.3], "sum", combination_type=way, svd_rank=rank)
    twin.load_adapter(str(tmp_path / "out"), "ours")
    modules = [module for module in twin.modules() if hasattr(module, "get_delta_weight")]
    assert len(modules) == 21
    for module in modules:
        torch.testing.assert_close(module.get_delta_weight("ours"), module.get_delta_weight("sum"), rtol=0, atol=1e-6)


def test_svd_is_the_nearest_of_its_rank(adapters: Path, tmp_path: Path) -> None:
    references, weights = [str(adapters / "plain"), str(adapters / "rslora")], [0.5, 0.5]
    found = combine_adapters(references, weights, tmp_path / "out", "svd", 4)
    expected = weighted_sum(adapters, {"plain": 0.5, "rslora": 0.5})
    values = [torch.linalg.svdvals(update) for update in expected.values()]
    lost = sum(float((each[4:] ** 2).sum()) for each in values) / sum(float((each**2).sum()) for each in values)
    assert found.error == pytest.approx(lost**0.5, rel=1e-5)
    assert found.rank == 4


def test_build_takes_it_and_the_command_makes_it(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter at half its weight, twice, is the adapter."""
    save_base(tmp_path / "base")
    (tmp_path / "base" / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')
    plain = str(adapters / "plain")
    assert main(["merge", plain, plain, "--weights", "0.75", "0.25", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: rank 8, the weighted sum itself\n"
    vectors = []
    for name, adapter in {"one": plain, "two": str(tmp_path / "out")}.items():
        build_encoder(
            recipe_from(name, base=str(tmp_path / "base"), adapters=[adapter], dtype="float32"), tmp_path / name
        )
        vectors.append(Encoder.load(tmp_path / name, "cpu", "float32").model.state_dict())
    for name, tensor in vectors[0].items():
        torch.testing.assert_close(vectors[1][name], tensor, rtol=0, atol=1e-6)
    assert main(["merge", plain, "--weights", "1", "--out", str(tmp_path / "out")]) == 1
    assert "is there already and not empty" in capsys.readouterr().err
    command = ["merge", plain, str(adapters / "rslora"), "--combination-type", "svd", "--out", str(tmp_path / "small")]
    assert main([*command, "--svd-rank", "4", "--weights", "1", "1"]) == 0
    assert "rank 4, " in (printed := capsys.readouterr().out)
    assert printed.endswith(" % away from the weighted sum\n")


def test_the_files_of_the_first_adapter_come_along(adapters: Path, tmp_path: Path) -> None:
    """So that `build` chooses the same template, and asks for the stage before."""
    second = copy(adapters / "plain", tmp_path / "second")
    (second / "training_config.json").write_text('{"peft_model_name_or_path": "out/mntp", "seed": 1}')
    (second / "tokenizer.json").write_text("{}")
    (second / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')
    combine_adapters([str(second), str(second)], [0.5, 0.5], tmp_path / "out")
    written = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.json")}
    assert json.loads(written["training_config.json"]) == {"peft_model_name_or_path": ["out/mntp"]}
    assert written["llm2vec_config.json"] == '{"pooling_mode": "mean"}'
    assert written["tokenizer.json"] == "{}"
    save_base(tmp_path / "base")
    with pytest.raises(ValueError, match="was trained on top of out/mntp"):
        build_encoder(recipe_from("x", base=str(tmp_path / "base"), adapters=[str(tmp_path / "out")]), tmp_path / "x")


def copy(source: Path, folder: Path, **changes: Any) -> Path:
    """The adapter with other keys in its configuration."""
    folder.mkdir()
    save_file(load_file(source / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "files", "told"),
    [
        (
            {"base_model_name_or_path": "org/other"},
            {},
            "has the base_model_name_or_path org/base, and .* has org/other",
        ),
        ({"revision": "b"}, {}, "has the revision a, and .* has b"),
        ({"use_dora": True}, {}, "uses use_dora True, more than plain LoRA: merge it with peft first"),
        ({"modules_to_save": ["score"]}, {}, r"uses modules_to_save \['score'\], more than plain LoRA"),
        ({}, {"training_config.json": {"peft_model_name_or_path": "out/mntp"}}, "of the base alone|on top of out/mntp"),
        (
            {},
            {"llm2vec_config.json": {"pooling_mode": "last_token"}},
            "has the pooling_mode 'mean', and .*'last_token'",
        ),
        ({}, {"encoder_config.json": {"attention": "causal"}}, "has the attention 'bidirectional', and .*'causal'"),
    ],
)
def test_adapters_that_do_not_belong_together_are_refused(
    adapters: Path, tmp_path: Path, changes: dict[str, Any], files: dict[str, Any], told: str
) -> None:
    known = {"base_model_name_or_path": "org/base", "revision": "a"}
    one = copy(adapters / "plain", tmp_path / "one", **known)
    other = copy(adapters / "plain", tmp_path / "other", **{**known, **changes})
    (one / "config.json").write_text("{}")
    (one / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')
    (one / "encoder_config.json").write_text('{"attention": "bidirectional"}')
    for name, content in files.items():
        (other / name).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=told):
        combine_adapters([str(one), str(other)], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_published_stages_are_told_apart_by_name(adapters: Path, tmp_path: Path) -> None:
    first = copy(adapters / "plain", tmp_path / "LLM2Vec-Sheared-LLaMA-mntp")
    second = copy(adapters / "plain", tmp_path / "LLM2Vec-Sheared-LLaMA-mntp-supervised")
    with pytest.raises(
        AdapterError, match=r"trained on top of the base alone, and .* on top of McGill-NLP/LLM2Vec-Shea"
    ):
        combine_adapters([str(first), str(second)], [0.5, 0.5], tmp_path / "out")


@pytest.mark.parametrize(
    ("kinds", "weights", "way", "rank", "told"),
    [
        (["plain"], [0.5, 0.5], "cat", None, "1 adapters and 2 weights: give one weight for each adapter"),
        (["plain"], [float("nan")], "cat", None, "they must be finite"),
        (["plain"], [1.0], "cat", 4, "svd_rank is 4: give it with combination_type svd"),
        (
            ["plain", "rslora"],
            [1.0, 1.0],
            "linear",
            None,
            "needs equal ranks, and those of .* are 4, 6: use cat or svd",
        ),
    ],
)
def test_what_can_not_be_combined_is_told(
    adapters: Path, tmp_path: Path, kinds: list[str], weights: list[float], way: Any, rank: int | None, told: str
) -> None:
    with pytest.raises(AdapterError, match=told):
        combine_adapters([str(adapters / kind) for kind in kinds], weights, tmp_path / "out", way, rank)


def test_adapters_of_different_widths_are_told(adapters: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "gemma", tiny_model("gemma"), 0)
    with pytest.raises(AdapterError, match="they were trained for different bases"):
        combine_adapters([str(adapters / "plain"), str(tmp_path / "gemma")], [1.0, 1.0], tmp_path / "out")
