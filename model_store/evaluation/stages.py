"""The stages from a base to an LLM2Vec encoder, in the paper's order (BehnamGhader et al. 2024), for evaluation.

First comes the causal base as it is, then the base with bidirectional attention alone, then with one more adapter
merged each time. Each encoder is built in a temporary folder at its turn, so disk and memory hold one at a time.
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
    """(name, function that loads it) of every stage. A stage must be loaded before the next one is asked for.

    `load` gets a stored encoder's folder, and whether its attention is causal.

    Raises:
        ValueError: the errors of `build_encoder`.
    """
    for merged, name in enumerate(["bidirectional", *_names(recipe.adapters)]):
        with tempfile.TemporaryDirectory(prefix="llm2vec-stage-") as scratch:
            folder = Path(scratch) / "encoder"
            build_encoder(recipe.model_copy(update={"adapters": recipe.adapters[:merged]}), folder, progress)
            if merged == 0:
                yield "causal", partial(load, folder, True)
            yield name, partial(load, folder, False)


def _names(adapters: tuple[str, ...]) -> list[str]:
    """The last part of each reference, or whole references if two last parts are the same."""
    short = [re.split("[/:]", reference.partition("@")[0].rstrip("/"))[-1] for reference in adapters]
    return [f"+ {name}" for name in (short if len(set(short)) == len(short) else adapters)]
