"""How near our vectors are to the official library's: the table in docs/fidelity.md.

    python -m tests.fidelity.table          prints the table
    python -m tests.fidelity.table --save   writes docs/fidelity.md

From the golden fixtures in tests/fidelity, on the CPU: family × pooling × truncation, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_store.architectures import Attention
from model_store.build.build import build_encoder
from model_store.manifest import Manifest
from model_store.recipe import recipe_from
from tests.fidelity.golden_set import FAMILIES, build_like, comparable, encode, golden, tokenize
from tests.model_store.test_description import PROMPTS, ROWS, ours, publish, theirs
from tests.model_store.test_published import LAYOUTS, OTHERS, vectors_of
from tests.tiny import normalized

_HEAD = """# Fidelity

## The same text in another batch

A text's vector does not depend on its batch mates, but for rounding. The libraries of matrix products choose a kernel
by the number of rows in the batch, and each kernel sums in its own order. For a text alone, among 64 others and beside
a text of 4096 tokens, the largest difference of a component of the demo model's L2-normalised vectors is:

| device | bfloat16 | float32 |
|---|---|---|
| AMD CPU with AVX-512-bf16 | none: equal bits | none: equal bits |
| Intel CPU with AMX | 4.9e-03; the cosine is at least 0.9998 | 4e-07 |
| CUDA | not measured; 1 − cosine of 1e-6 to 1e-4 is expected | not measured |

Other CPUs have not been measured. tests/e2e/test_demo.py holds the demo model to equal bits on every AMD CPU, and to
differences of at most 1e-2 with a cosine of at least 0.9995 (bfloat16) or 2e-6 (float32) on all others.

`LLM2VEC_EQUAL_BITS=true` makes the bits equal on a CPU by products of a fixed number of rows (docs/performance.md). The
start checks that they are, and ends with the reason where they are not. It has run on the AMD CPU only.

## The official library

Vectors of this project against those of llm2vec 0.2.3, from raw text, for tiny seeded checkpoints in the published
layout (see `tests/fidelity/README.md`). Largest difference of a component of the L2-normalised vectors, and largest
1 − cosine, over all inputs. `token` compares what nothing was cut from; `reference` compares everything, cut as the
official library cuts. Official vectors are float32 in both columns.

The official library shortens a text by whole words. Nothing is left of a text of more than 400 tokens without spaces,
such as Chinese or Japanese, and all such texts get the same vector. A server under `--truncation reference` refuses
them with 400; `LLM2VEC_EMPTY_TEXT=bos` gives them the official library's vector, which is compared here.

Made by `make fidelity-table` on {machine}.

| family | pooling | truncation | float32: max difference | 1 − cosine | bfloat16: max difference | 1 − cosine |
|---|---|---|---|---|---|---|
"""


_OTHERS = """
## Encoders that sentence-transformers' files describe

Vectors of this project against those of sentence-transformers {version}, from raw text, for tiny seeded checkpoints
that the library itself saved (tests/model_store/test_description.py): the largest difference of a component of the
L2-normalised float32 vectors over all texts, without a prompt and with those of queries and documents. The last column
is the same with attention in the other direction, which must differ. It is refused for the configuration flag of Gemma
3 that means one direction.

| checkpoint | max difference | in the other direction |
|---|---|---|
"""


_PUBLISHED = """
## Recipes of encoders that are not LLM2Vec's

The same for tiny seeded checkpoints in the layouts of published encoders, built by their packaged recipes
(tests/model_store/test_published.py). sentence-transformers gets each checkpoint with what only code of the model's own
does in words that transformers knows. The last column is how much the queries' prompt moves a component.

| recipe | max difference | without the prompt |
|---|---|---|
"""


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    here = json.loads(subprocess.check_output([sys.executable, "-m", "bench.report"], text=True))
    about = f"{here['processor']}, torch {here['versions']['torch']}, transformers {here['versions']['transformers']}"
    lines = [row for family in FAMILIES for tensor in golden(family).truths() for row in rows(family, tensor)]
    page = _HEAD.format(machine=about) + "\n".join(lines) + "\n"
    page += _OTHERS.format(version=version("sentence-transformers")) + "\n".join(map(described_row, ROWS)) + "\n"
    page += _PUBLISHED + "\n".join(map(published_row, [*LAYOUTS, *OTHERS])) + "\n"
    if options.save:
        (Path(__file__).parents[2] / "docs" / "fidelity.md").write_text(page)
    print(page)


def described_row(row: str) -> str:
    """The table's line for one checkpoint that sentence-transformers saved."""
    with tempfile.TemporaryDirectory() as scratch:
        published = publish(Path(scratch), *ROWS[row])
        attention = build(published, Path(scratch) / "encoder").attention
        other: Attention = "causal" if attention == "bidirectional" else "bidirectional"
        differences = []
        for prompt, asked in ((None, ""), ("query", PROMPTS["query"]), ("document", PROMPTS["document"])):
            expected = theirs(published, prompt_name=prompt)
            differences.append(np.abs(ours(Path(scratch) / "encoder", asked) - expected).max())
        turned = "refused"  # which one flag of Gemma 3 asks for
        if "use_bidirectional_attention" not in ROWS[row][1]:
            build(published, Path(scratch) / "other", other)
            turned = f"{np.abs(ours(Path(scratch) / 'other') - theirs(published)).max():.1e}"
    return f"| {row} | {max(differences):.1e} | {turned} |"


def published_row(case: str) -> str:
    """The table's line for the tiny checkpoint of a recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        pairs = vectors_of(case, Path(scratch))
    most = max(np.abs(mine - expected).max() for mine, expected in pairs)
    return f"| {case} | {most:.1e} | {np.abs(pairs[0][1] - pairs[-1][1]).max():.1e} |"


def build(published: Path, folder: Path, attention: Attention | None = None) -> Manifest:
    """A stored float32 encoder of what was published."""
    return build_encoder(recipe_from("encoder", base=str(published), dtype="float32", attention=attention), folder)


def rows(family: str, tensor: str) -> list[str]:
    """The table's lines for one family and pooling."""
    one = golden(family)
    cells: dict[str, list[str]] = {"token": [], "reference": []}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "encoder"
            build_like(one, tensor, folder, dtype)
            for truncation, found in cells.items():
                chosen = comparable(one, tensor, uncut_only=truncation == "token")
                ours = encode(folder, tokenize(folder, one, truncation == "reference"), dtype)
                found += compare(ours[chosen], normalized(one.vectors[tensor])[chosen])
    return [f"| {family} | {tensor} | {truncation} | {' | '.join(found)} |" for truncation, found in cells.items()]


def compare(ours: Any, theirs: Any) -> list[str]:
    """Largest difference of a component, and largest 1 − cosine."""
    cosine = torch.cosine_similarity(ours.double(), theirs.double(), dim=1)
    return [f"{(ours - theirs).abs().max():.1e}", f"{max(0.0, float((1 - cosine).max())):.1e}"]


if __name__ == "__main__":
    main()
