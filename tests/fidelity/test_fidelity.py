"""Our vectors against the official library's, from raw text, for every checkpoint family."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from model_store.build.build import build_encoder
from model_store.recipe import recipe_from
from tests.e2e.process import ServerProcess
from tests.fidelity.golden_set import FAMILIES, build_like, comparable, encode, golden, tokenize
from tests.tiny import normalized

# On L2-normalised float32 vectors; the largest that was seen is 2e-7.
TOLERANCE = 1e-5

# Over HTTP the server has on whatever makes it fast, and gives a text that is cut to nothing the official vector.
FAST = {"LLM2VEC_COMPILE": "on", "LLM2VEC_EMPTY_TEXT": "bos"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any) -> str:
    return str(request.param)


def truth_of(family: str) -> list[str]:
    return golden(family).truths()


@pytest.mark.parametrize(
    ("family_name", "tensor"), [(family, tensor) for family in FAMILIES for tensor in truth_of(family)]
)
def test_vectors_equal_the_official_ones(
    family_name: str, tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = golden(family_name)
    folder = tmp_path / "encoder"
    build_like(one, tensor, folder)
    for reference in (True, False):
        chosen = comparable(one, tensor, uncut_only=not reference)
        rows = tokenize(folder, one, reference)
        for ours, theirs, take in zip(rows, one.rows(tensor), chosen, strict=True):
            if not take:
                continue
            assert ours.token_ids == theirs["token_ids"]
            assert ours.cut == theirs["cut"]
            if theirs["n"] and tensor != "mean_whole_row":
                assert len(ours) - ours.span_start == theirs["n"]
        difference = (encode(folder, rows) - normalized(one.vectors[tensor]))[chosen].abs().max().item()
        assert difference < TOLERANCE
        if reference:
            with capsys.disabled():
                print(f"\n{family_name:12} {tensor:15} largest difference {difference:.1e}", end="")


def test_controls_do_not_match(family: str, tmp_path: Path) -> None:
    """MNTP left out, causal attention, instruction pooled: each must be seen, or the test above shows nothing."""
    one = golden(family)
    folder = tmp_path / "encoder"
    build_like(one, "mean", folder)
    ours = encode(folder, tokenize(folder, one, reference=True))
    telling = torch.tensor([1 < row["n"] < len(row["token_ids"]) for row in one.rows("mean")])
    controls = [name for name, about in one.document["tensors"].items() if about["control"]]
    assert {"without_mntp", "causal"} <= set(controls)
    for control in [*controls, "mean_whole_row"]:
        difference = (ours - normalized(one.vectors[control])).abs().amax(1)[telling]
        assert difference.median() > 100 * TOLERANCE, control


def test_causal_attention_is_what_the_control_says(family: str, tmp_path: Path) -> None:
    """A recipe's `attention = "causal"` is the official library's `enable_bidirectional=False`."""
    one = golden(family)
    folder = tmp_path / "encoder"
    build_like(one, "causal", folder, attention="causal")
    ours = encode(folder, tokenize(folder, one, reference=True))
    assert (ours - normalized(one.vectors["causal"])).abs().max() < TOLERANCE


def test_without_mntp_is_what_the_control_says(family: str, tmp_path: Path) -> None:
    """The control is reproduced too: the difference is the missing stage and nothing else."""
    one = golden(family)
    name = one.document["name_or_path"]
    second_only = recipe_from(
        "second-only",
        base=str(one.folder / "base"),
        adapters=[str(one.folder / "second")],
        template=build_template(name, one.document["tensors"]["mean"]["pooling"]),
        max_length=one.document["max_length"],
        doc_max_length=one.document["doc_max_length"],
        dtype="float32",
    )
    build_encoder(second_only, tmp_path / "encoder")
    ours = encode(tmp_path / "encoder", tokenize(tmp_path / "encoder", one, reference=True))
    assert (ours - normalized(one.vectors["without_mntp"])).abs().max() < TOLERANCE


def build_template(name: str, pooling: str) -> Any:
    from model_store.architectures import ARCHITECTURES
    from model_store.templates import template_for

    return template_for(name, pooling, ARCHITECTURES["llama"])


@pytest.mark.parametrize("layout", ["merged", "causal-lm-adapter"])
def test_other_layouts_of_the_same_checkpoint(layout: str, tmp_path: Path) -> None:
    """What `l2v.save(merge_before_save=True)` writes, and an adapter that was saved from the causal-LM wrapper."""
    one = golden("llama")
    folder = tmp_path / "encoder"
    if layout == "merged":
        build_encoder(recipe_from("merged", base=str(one.folder / "merged"), dtype="float32"), folder)
    else:
        stages = [str(one.folder / "causal-lm-adapter"), str(one.folder / "second")]
        recipe = recipe_from(
            "wrapped",
            base=str(one.folder / "base"),
            adapters=stages,
            template=build_template(one.document["name_or_path"], "mean"),
            max_length=one.document["max_length"],
            doc_max_length=one.document["doc_max_length"],
            dtype="float32",
        )
        build_encoder(recipe, folder)
    ours = encode(folder, tokenize(folder, one, reference=True))
    assert (ours - normalized(one.vectors["mean"])).abs().max() < TOLERANCE


def test_bfloat16_is_near(family: str, tmp_path: Path) -> None:
    one = golden(family)
    folder = tmp_path / "encoder"
    build_like(one, "mean", folder, dtype="bfloat16")
    ours = encode(folder, tokenize(folder, one, reference=True), dtype="bfloat16")
    cosines = (ours * normalized(one.vectors["mean"])).sum(1)
    assert cosines.min() > 0.998


def test_over_http_single_batched_shuffled_and_concurrent(family: str, tmp_path: Path) -> None:
    one = golden(family)
    build_like(one, "mean", tmp_path / "encoder")
    expected = normalized(one.vectors["mean"]).numpy()
    order = list(range(len(one.texts)))

    with ServerProcess(tmp_path / "encoder", FAST, "--dtype", "float32", "--truncation", "reference") as server:

        def ask(indexes: list[int]) -> httpx.Response:
            """The API has one instruction a request, so these share theirs."""
            answer = server.embed([one.texts[i] for i in indexes], instruction=one.instructions[indexes[0]])
            assert answer.status_code == 200, answer.text
            vectors = np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)
            assert np.abs(vectors - expected[indexes]).max() < TOLERANCE
            return answer

        for index in order:
            answer = ask([index])
            assert answer.json()["usage"]["truncated_inputs"] == int(one.rows("mean")[index]["cut"])
            assert answer.headers["x-truncated-inputs"] == str(int(one.rows("mean")[index]["cut"]))
        for shuffled in (False, True):
            if shuffled:
                random.Random(0).shuffle(order)
            for instruction in set(one.instructions):
                ask([index for index in order if one.instructions[index] == instruction])
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, [[index] for index in order * 4]))
        cut = sum(row["cut"] for row in one.rows("mean"))
        assert server.metric("llm2vec_truncated_inputs_total") == 7 * cut
