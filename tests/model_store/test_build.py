from __future__ import annotations

import fcntl
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from model_store.architectures import UnsupportedArchitectureError
from model_store.build.adapters import AdapterError
from model_store.build.build import BuildError, build_encoder, ensure_built
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.errors import CheckpointError
from model_store.manifest import read_manifest
from model_store.recipe import Recipe, recipe_from
from model_store.templates import TEMPLATES
from service.cli import main
from tests.tiny import build_tiny, normalized, padded_vectors, random_rows, save_adapter, save_base, tiny_model

ROWS = random_rows([5, 30, 1, 12])


def recipe(base: Path, *adapters: Path, **parts: Any) -> Recipe:
    return recipe_from(
        "tiny", base=str(base), adapters=[str(adapter) for adapter in adapters], **{"dtype": "float32", **parts}
    )


def vectors_of(folder: Path) -> torch.Tensor:
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    return normalized(encoder.encode(PackedBatch.pack(ROWS, "mean")))


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin"])
def test_every_file_layout_gives_the_base(tmp_path: Path, layout: str) -> None:
    save_base(tmp_path / "base", layout=layout)
    build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    expected = normalized(padded_vectors(tiny_model("llama", head=True).model, ROWS))
    assert (vectors_of(tmp_path / "encoder") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_that_training_wrapped_are_those_of_the_decoder(tmp_path: Path, prefix: str) -> None:
    """As torch.compile, DistributedDataParallel and FSDP leave them, around the model or a layer of it."""
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    build_encoder(recipe(tmp_path / "base", tmp_path / "adapter"), tmp_path / "plain")
    for path in (tmp_path / "base" / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"):
        tensors = {name.replace("layers.1.", f"layers.1.{prefix}"): tensor for name, tensor in load_file(path).items()}
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    build_encoder(recipe(tmp_path / "base", tmp_path / "adapter"), tmp_path / "wrapped")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "wrapped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("head", [True, False])
def test_merged_adapters_equal_base_and_adapters_forward(tmp_path: Path, head: bool) -> None:
    """The slow twin is peft: two adapters, merged by it one after the other, from both kinds of wrapper."""
    save_base(tmp_path / "base", head=True)
    twin = tiny_model("llama", head=True)
    for seed, options in enumerate(
        ({}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"k_proj": 2}})
    ):
        adapted = save_adapter(tmp_path / f"adapter-{seed}", twin if head else twin.model, seed, **options)
        merged = adapted.merge_and_unload()
        if head:
            twin = merged
        else:
            twin.model = merged
    build_encoder(recipe(tmp_path / "base", tmp_path / "adapter-0", tmp_path / "adapter-1"), tmp_path / "encoder")
    expected = normalized(padded_vectors(twin.model, ROWS))
    assert (vectors_of(tmp_path / "encoder") - expected).abs().max() < 1e-5
    # A control: the second stage alone is another encoder.
    build_encoder(recipe(tmp_path / "base", tmp_path / "adapter-1"), tmp_path / "second-only")
    assert (vectors_of(tmp_path / "second-only") - expected).abs().max() > 1e-2


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for seed in (0, 1):
        save_adapter(tmp_path / f"adapter-{seed}", tiny_model("llama").requires_grad_(False), seed)
    build_encoder(
        recipe(tmp_path / "base", tmp_path / "adapter-0", tmp_path / "adapter-1", dtype="bfloat16"),
        tmp_path / "encoder",
    )
    exact = base.state_dict()["model.layers.0.self_attn.q_proj.weight"].double()
    for seed in (0, 1):
        tensors = load_file(tmp_path / f"adapter-{seed}" / "adapter_model.safetensors")
        key = "base_model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        exact += 2.0 * tensors[key.format("B")].double() @ tensors[key.format("A")].double()
    stored = load_file(tmp_path / "encoder" / "model.safetensors")["layers.0.self_attn.q_proj.weight"]
    assert torch.equal(stored, exact.float().bfloat16())


def test_automodel_opens_the_folder_and_is_bidirectional(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder", "gemma3_text")
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert model.config.is_causal is False
    rows = random_rows([40])
    token_ids = torch.tensor([rows[0].token_ids])
    with torch.inference_mode():
        hidden = model(input_ids=token_ids).last_hidden_state[0]
    ours = normalized(
        Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32").encode(PackedBatch.pack(rows, "mean"))
    )
    assert (normalized(hidden[1:].mean(0)[None]) - ours).abs().max() < 1e-5


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder", shard_bytes=100_000)
    assert len(list((tmp_path / "encoder").glob("model-*.safetensors"))) > 1
    expected = normalized(padded_vectors(tiny_model("llama", head=True).model, ROWS))
    assert (vectors_of(tmp_path / "encoder") - expected).abs().max() < 1e-5


def test_the_same_recipe_gives_the_same_files_and_space(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    one = build_encoder(recipe(tmp_path / "base"), tmp_path / "one")
    two = build_encoder(recipe(tmp_path / "base"), tmp_path / "two")
    other = build_encoder(recipe(tmp_path / "base", pooling="last_token"), tmp_path / "other")
    assert one.files == two.files
    assert one.embedding_space == two.embedding_space != other.embedding_space


@pytest.mark.parametrize(
    ("asked", "found", "shown"), [([], (), "not known"), ([32, 16], (16, 32, 64), "16, 32, 64"), ([64], (64,), "64")]
)
def test_widths_are_those_asked_for_and_the_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[int], found: tuple[int, ...], shown: str
) -> None:
    save_base(tmp_path / "base")
    plain = build_encoder(recipe(tmp_path / "base"), tmp_path / "plain")
    built = build_encoder(recipe(tmp_path / "base", widths=asked), tmp_path / "encoder")
    assert built.widths == read_manifest(tmp_path / "encoder").widths == found
    assert built.embedding_space == plain.embedding_space
    assert (built.recipe_fingerprint == plain.recipe_fingerprint) == (not asked)
    assert main(["show", str(tmp_path / "encoder")]) == 0
    assert re.search(f"^may be cut to +{shown}$", capsys.readouterr().out, re.MULTILINE)


def test_a_width_above_the_encoder_s_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    with pytest.raises(BuildError, match="vectors of 64 dimensions can't be cut to 128"):
        build_encoder(recipe(tmp_path / "base", widths=[32, 128]), tmp_path / "encoder")
    assert _nothing_left(tmp_path)


def test_a_stage_with_a_config_names_the_template_and_brings_its_tokenizer(tmp_path: Path) -> None:
    """The shape of an MNTP repository: adapter, tokenizer, and a config.json that names the base and remote code."""
    save_base(tmp_path / "base")
    adapter = tmp_path / "mntp"
    save_adapter(adapter, tiny_model("llama"), 0)
    name = "mistralai/Mistral-7B-Instruct-v0.2"
    (adapter / "config.json").write_text(json.dumps({"_name_or_path": name, "auto_map": {"AutoModel": "evil.Model"}}))
    (adapter / "evil.py").write_text("raise SystemExit('remote code ran')")
    shutil.copyfile(tmp_path / "base" / "tokenizer.json", adapter / "tokenizer.json")
    (adapter / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    (adapter / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "weighted_mean", "max_length": 128}))
    manifest = build_encoder(recipe(tmp_path / "base", adapter), tmp_path / "encoder")
    assert manifest.template == TEMPLATES[name]
    assert manifest.tokenizer == str(adapter)
    assert (manifest.pooling, manifest.max_length, manifest.doc_max_length) == ("weighted_mean", 128, 400)
    stored = {path.name for path in (tmp_path / "encoder").iterdir()}
    assert "evil.py" not in stored
    for name in stored:
        assert b"evil" not in (tmp_path / "encoder" / name).read_bytes()


def test_ensure_built_keeps_what_is_whole_and_rebuilds_the_rest(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    folder = tmp_path / "encoder"
    wanted = recipe(tmp_path / "base")
    built: list[int] = []
    count = lambda done, total: built.append(done)  # noqa: E731
    ensure_built(wanted, folder, count)
    assert built
    built.clear()
    ensure_built(wanted, folder, count)
    assert not built
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    ensure_built(wanted, folder, count)
    assert built
    built.clear()
    assert ensure_built(recipe(tmp_path / "base", pooling="last_token"), folder, count).pooling == "last_token"
    assert built


# What is wrong with the parts, and what the error must name.


def _nothing_left(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(
        name for name in ("base", "adapter") if (folder / name).exists()
    )


def test_an_adapter_for_another_width_names_both_shapes(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("gemma"), 0)
    with pytest.raises(
        AdapterError, match=r"_proj.weight has shape \(\d+, 64\).*, 64\): it was trained for another base"
    ):
        build_encoder(recipe(tmp_path / "base", tmp_path / "adapter"), tmp_path / "encoder")
    assert _nothing_left(tmp_path)


def _edit_adapter(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64),
                             "base_model.model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(96, 4)}),
         r"no layers\.9\.mlp\.up_proj\.weight"),
        (lambda t: t.pop("base_model.model.layers.0.mlp.up_proj.lora_A.weight"), "up_proj has lora_B only"),
        (lambda t: t.update({"base_model.model.norm.extra": torch.zeros(1)}), r"norm\.extra is not a plain LoRA"),
        (lambda t: t.update({"base_model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(3, 64)}),
         "no common rank"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)  # fmt: skip
def test_an_adapter_tensor_without_a_place_is_named(tmp_path: Path, change: Any, message: str) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    _edit_adapter(tmp_path / "adapter", change)
    with pytest.raises(AdapterError, match=message):
        build_encoder(recipe(tmp_path / "base", tmp_path / "adapter"), tmp_path / "encoder")
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "uses use_dora True, more than plain LoRA: merge it with peft first"),
        ("bias", "all", "bias 'all'"),
        ("modules_to_save", ["norm"], "modules_to_save"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("init_lora_weights", "pissa_niter_4", "pissa"),
        ("init_lora_weights", "lora_ga", "lora_ga"),
        ("arrow_config", {"top_k": 2}, "arrow_config"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("target_parameters", ["x"], "target_parameters"),
        ("peft_type", "IA3", "only LORA"),
        ("use_something_new", True, "does not know.*use_something_new"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("layer_replication", [[0, 2], [1, 3]], "layer_replication"),
        ("r", 8, "rank 4, adapter_config.json says 8"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(AdapterError, match=message):
        build_encoder(recipe(tmp_path / "base", tmp_path / "adapter"), tmp_path / "encoder")


def _edit_base(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks norm\.weight"),
        (lambda t: t.update({"model.layers.0.mystery": torch.zeros(2)}), r"holds layers\.0\.mystery"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm\.weight has shape \(7,\).*\(64,\)"),
        (lambda t: t.update({"_orig_mod.norm.weight": torch.ones(64)}), r"both norm\.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"norm\.weight holds NaN"),
    ],
)
def test_a_base_that_does_not_fit_its_config_is_named(tmp_path: Path, change: Any, message: str) -> None:
    save_base(tmp_path / "base")
    _edit_base(tmp_path / "base", change)
    with pytest.raises((BuildError, CheckpointError), match=message):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    assert _nothing_left(tmp_path)


def test_unusable_bases_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({**written, "model_type": "bloom"}))
    with pytest.raises(UnsupportedArchitectureError, match=r"bloom.*llama"):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    config.write_text(json.dumps({**written, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="gptq"):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    config.write_text(json.dumps(written))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    with pytest.raises(CheckpointError, match="adapter is an adapter: give it with --adapter, and the model it was"):
        build_encoder(recipe(tmp_path / "adapter"), tmp_path / "encoder")


def test_a_torch_file_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base", layout="bin")
    torch.save({"weight": Path("/etc")}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain file of tensors"):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")


def test_an_index_can_not_name_files_elsewhere(tmp_path: Path) -> None:
    save_base(tmp_path / "base", layout="sharded")
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in"):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")


def test_bos_pooling_needs_a_tokenizer_with_bos(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="bos_token pooling"):
        build_tiny(tmp_path / "encoder", bos=False, pooling="bos_token")
    assert not (tmp_path / "encoder").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildError, match="not empty"):
        build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    assert (tmp_path / "encoder" / "thesis.txt").read_text() == "years of work"


def test_what_a_killed_build_left_goes(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / ".encoder.lock").touch()
    killed = tmp_path / ".encoder-building-1"
    (killed / "encoder").mkdir(parents=True)
    (killed / "encoder" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".other-building-1").mkdir()
    build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "encoder", ".other-building-1"}


def test_a_build_waits_for_one_that_runs_and_finds_what_it_made(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    wanted = recipe(tmp_path / "base")
    built = tmp_path / "elsewhere" / "encoder"
    build_encoder(wanted, built)
    with (tmp_path / ".encoder.lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(ensure_built, wanted, tmp_path / "encoder")
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        built.rename(tmp_path / "encoder")
        made = (tmp_path / "encoder" / "manifest.json").stat().st_mtime_ns
        (tmp_path / ".encoder.lock").unlink()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result(60).name == wanted.name
    assert (tmp_path / "encoder" / "manifest.json").stat().st_mtime_ns == made


def test_a_damaged_encoder_is_replaced(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    wanted = recipe(tmp_path / "base")
    whole = ensure_built(wanted, tmp_path / "encoder")
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert ensure_built(wanted, tmp_path / "encoder").files == whole.files
    assert {path.name for path in tmp_path.iterdir()} == {"base", "encoder"}


def test_the_manifest_says_where_everything_came_from(tmp_path: Path) -> None:
    manifest = build_tiny(tmp_path / "encoder", query_instruction="Find:")
    assert manifest == read_manifest(tmp_path / "encoder")
    assert manifest.base.reference == str(tmp_path / "encoder-base")
    assert manifest.query_instruction == "Find:"
    assert (
        manifest.tools["torch"] == torch.__version__.partition("+")[0] or manifest.tools["torch"] == torch.__version__
    )
    assert set(manifest.files) == {path.name for path in (tmp_path / "encoder").iterdir()} - {"manifest.json"}


def test_remote_code_of_a_base_or_a_stored_encoder_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it may."""
    from model_store.encoder.encoder import Encoder

    def asked(*_: object) -> str:
        raise AssertionError("asked whether to run remote code")

    monkeypatch.setattr("builtins.input", asked)
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    remote = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}

    def poison(folder: Path) -> None:
        (folder / "evil.py").write_text(evil)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": remote}))

    save_base(tmp_path / "base")
    poison(tmp_path / "base")
    build_encoder(recipe(tmp_path / "base"), tmp_path / "encoder")
    assert not (tmp_path / "encoder" / "evil.py").exists()
    poison(tmp_path / "encoder")  # which a server refuses before, as it was changed
    Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_was_trained_again_in_its_place_is_built_again(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    asked = recipe(tmp_path / "base", tmp_path / "adapter")
    ensure_built(asked, tmp_path / "encoder")
    first = vectors_of(tmp_path / "encoder")
    (tmp_path / "adapter" / "README.md").write_text("it changes no vector")
    shutil.rmtree(tmp_path / "adapter" / "checkpoint-3", ignore_errors=True)
    inode = (tmp_path / "encoder").stat().st_ino
    ensure_built(asked, tmp_path / "encoder")
    assert (tmp_path / "encoder").stat().st_ino == inode  # kept as it is
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 1)
    ensure_built(asked, tmp_path / "encoder")
    assert (vectors_of(tmp_path / "encoder") - first).abs().max() > 1e-2
    shutil.rmtree(tmp_path / "adapter")  # once built it is not needed any more
    inode = (tmp_path / "encoder").stat().st_ino
    ensure_built(asked, tmp_path / "encoder")
    assert (tmp_path / "encoder").stat().st_ino == inode


def test_one_s_own_second_stage_without_its_first_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    for seed, name in enumerate(("mntp", "simcse")):
        save_adapter(tmp_path / name, tiny_model("llama"), seed)
    trained = {"model_name_or_path": "base", "peft_model_name_or_path": "out/mntp"}
    (tmp_path / "simcse" / "training_config.json").write_text(json.dumps(trained))
    with pytest.raises(BuildError, match=r"simcse was trained on top of out/mntp .* give that adapter first"):
        build_encoder(recipe(tmp_path / "base", tmp_path / "simcse"), tmp_path / "encoder")
    build_encoder(recipe(tmp_path / "base", tmp_path / "mntp", tmp_path / "simcse"), tmp_path / "encoder")


def test_an_adapter_beside_torch_files_of_the_base(tmp_path: Path) -> None:
    """In one folder, as some repositories have them: the base's weights are not looked for in the adapter's file."""
    save_base(tmp_path / "base", layout="bin")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "adapter" / name, tmp_path / "base" / name)
    build_encoder(recipe(tmp_path / "base", tmp_path / "base"), tmp_path / "one")
    build_encoder(recipe(tmp_path / "base", tmp_path / "adapter"), tmp_path / "two")
    assert torch.equal(vectors_of(tmp_path / "one"), vectors_of(tmp_path / "two"))
