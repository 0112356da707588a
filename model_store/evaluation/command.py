"""`llm2vec-service eval`: what is evaluated, on which tasks, and what becomes of the scores.

Knows nothing of HTTP: vectors of a running server come from a function that it is handed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.evaluation.report import Score, draw, table, write_json
from model_store.evaluation.sts import evaluate_sts, read_pairs
from model_store.pooling_modes import PoolingMode
from model_store.recipe import RecipeError, load_recipe

# Poolings that a base which was never trained as an encoder is compared under: those of the paper.
STAGE_POOLINGS: tuple[PoolingMode, ...] = ("mean", "weighted_mean", "last_token")


class EvaluationError(ValueError):
    """An evaluation that makes no sense as asked for."""


@dataclass(frozen=True)
class Asked:
    """The command's options; see `llm2vec-service eval --help`."""

    url: str | None = None
    model: str | None = None
    stages: str | None = None
    adapter: Sequence[str] | None = None
    sts: Sequence[Path] = ()
    instruction: str = ""
    pooling: Sequence[PoolingMode] | None = None
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    json: Path | None = None
    picture: Path | None = None


class TextVectors(Protocol):
    """What is evaluated: (n, D) normalised vectors of texts under each of its settings."""

    def embed(self, texts: Sequence[str], instruction: str = "") -> dict[str, NDArray[np.float32]]: ...


class Task(Protocol):
    """One file or folder of data, read and checked before any model is loaded."""

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]: ...


@dataclass(frozen=True)
class ServerVectors:
    """A running server, by the function that embeds texts with it."""

    embed_texts: Callable[[Sequence[str], str], NDArray[np.float32]]

    def embed(self, texts: Sequence[str], instruction: str = "") -> dict[str, NDArray[np.float32]]:
        return {"as served": self.embed_texts(texts, instruction)}


def evaluate(asked: Asked, embed_texts: Callable[[Sequence[str], str], NDArray[np.float32]], models_dir: Path) -> None:
    """Evaluate and print; scores go to stderr one by one as they are found, the tables to stdout at the end.

    Raises:
        EvaluationError, DatasetError: before anything is computed.
        ValueError: what building, loading and embedding raise.
    """
    tasks = _tasks(asked)
    if not tasks:
        raise EvaluationError("there is nothing to evaluate on: give --sts FILE")
    for path in (asked.json, asked.picture):
        if path and not path.parent.is_dir():
            raise EvaluationError(f"{path.parent} is no folder: {path.name} can't be written there")
    scores: list[Score] = []
    for name, load in _models(asked, embed_texts, models_dir):
        vectors = load()
        for task in tasks:
            found = task.evaluate(name, vectors)
            for score in found:
                print(f"{name}: {score.task}, {score.metric}, {score.setting}: {score.value:.4f}", file=sys.stderr)
            scores += found
    print(table(scores))
    if asked.json:
        write_json(asked.json, scores, asdict(asked))
    if asked.picture:
        draw(asked.picture, scores)


def _tasks(asked: Asked) -> list[Task]:
    return [Sts(path, asked.instruction) for path in asked.sts]


def _models(
    asked: Asked, embed_texts: Callable[[Sequence[str], str], NDArray[np.float32]], models_dir: Path
) -> Iterator[tuple[str, Callable[[], TextVectors]]]:
    """(name, how to load it) of what is evaluated, one after the other."""
    if asked.url:
        if asked.pooling or asked.adapter:
            raise EvaluationError("--url evaluates what the server serves: leave out --pooling and --adapter")
        yield asked.url, partial(ServerVectors, embed_texts)
        return

    from model_store.build import ensure_built
    from model_store.evaluation.local import LocalEncoder
    from model_store.evaluation.stages import each_stage

    def load(folder: Path, causal: bool = False) -> LocalEncoder:
        poolings = asked.pooling or (STAGE_POOLINGS if asked.stages else ())
        return LocalEncoder.load(folder, poolings, asked.device, asked.dtype, causal)

    if asked.stages:
        recipe = load_recipe(asked.stages)
        if asked.adapter:
            recipe = recipe.model_copy(update={"adapters": tuple(asked.adapter)})
        yield from each_stage(recipe, load)
        return
    assert asked.model, "the parser asks for one of the three"
    if asked.adapter:
        raise RecipeError("--adapter goes with --stages: for an encoder with other adapters, build it first")
    if Path(asked.model).is_dir():
        yield Path(asked.model).resolve().name, partial(load, Path(asked.model))
        return
    recipe = load_recipe(asked.model)
    folder = models_dir / recipe.name
    ensure_built(recipe, folder)
    yield recipe.name, partial(load, folder)


class Sts:
    """Spearman's correlation on the pairs of a file."""

    def __init__(self, path: Path, instruction: str) -> None:
        self._name, self._instruction, self._pairs = f"STS, {path.name}", instruction, read_pairs(path)

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        texts = [text for pair in self._pairs for text in (pair.first, pair.second)]
        return [
            Score(model, self._name, "Spearman", setting, evaluate_sts(self._pairs, found))
            for setting, found in vectors.embed(texts, self._instruction).items()
        ]
