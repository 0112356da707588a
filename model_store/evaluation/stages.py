"""The stages that LLM2Vec makes of a base, in the paper's order (BehnamGhader et al. 2024), to be evaluated one by one.

The base as it is, causal; the base made bidirectional and nothing else; then with one more of its adapters merged each
time. Encoders are built in a temporary folder when their turn comes, so disk and memory hold one at a time.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from model_store.build.build import Progress, build_encoder
from model_store.evaluation.local import LocalEncoder
from model_store.recipe import Recipe


def each_stage(
    recipe: Recipe, load: Callable[[Path, bool], LocalEncoder], progress: Progress
) -> Iterator[tuple[str, Callable[[], LocalEncoder]]]:
    """(name, how to load it) of every stage, to be loaded before the next is asked for.

    `load` is given a stored encoder's folder and whether it is to attend causally.

    Raises:
        ValueError: what `build_encoder` raises.
    """
    for merged, name in enumerate(["bidirectional", *_names(recipe.adapters)]):
        with tempfile.TemporaryDirectory(prefix="llm2vec-stage-") as scratch:
            folder = Path(scratch) / "encoder"
            build_encoder(recipe.model_copy(update={"adapters": recipe.adapters[:merged]}), folder, progress)
            if merged == 0:
                yield "causal", partial(load, folder, True)
            yield name, partial(load, folder, False)


def _names(adapters: tuple[str, ...]) -> list[str]:
    """The last part of each reference, or all of it where they would be the same."""
    short = [re.split("[/:]", reference.partition("@")[0].rstrip("/"))[-1] for reference in adapters]
    return [f"+ {name}" for name in (short if len(set(short)) == len(short) else adapters)]
