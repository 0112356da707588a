"""`llm2vec-service eval`: what is evaluated, on which tasks, and what becomes of the scores.

Knows nothing of HTTP: vectors of a running server come from a function that it is handed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.errors import UserError
from model_store.evaluation.report import Score, check_picture, draw, table, write_json
from model_store.evaluation.retrieval import Retrieval
from model_store.evaluation.sts import Sts
from model_store.manifest import Role
from model_store.pooling_modes import PoolingMode
from model_store.recipe import load_recipe
from model_store.text.prompts import EncoderPrompts

# Poolings that a base which was never trained as an encoder is compared under: those of the paper.
STAGE_POOLINGS: tuple[PoolingMode, ...] = ("mean", "weighted_mean", "last_token")

# (texts, the instruction before each of them, their role) → (n, D) normalised vectors in the texts' order
EmbedTexts = Callable[[Sequence[str], str | None, Role | None], NDArray[np.float32]]

Progress = Callable[[int, int], None]


class EvaluationError(UserError):
    """An evaluation that makes no sense as asked for."""


@dataclass(frozen=True)
class Asked:
    """The command's options; see `llm2vec-service eval --help`."""

    url: str | None = None
    model: str | None = None
    stages: str | None = None
    adapter: Sequence[str] = ()
    sts: Sequence[Path] = ()
    words: Sequence[tuple[Path, Path]] = ()
    classification: Sequence[tuple[Path, Path]] = ()
    retrieval: Sequence[Path] = ()
    mteb: Sequence[str] = ()
    instruction: str | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None
    mteb_instructions: Path | None = None
    probe_limit: int | None = None
    pooling: Sequence[PoolingMode] = ()
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    json: Path | None = None
    picture: Path | None = None


@dataclass(frozen=True)
class ServerVectors:
    """The vectors of a running server, under its own pooling and with its own instructions, and its prompts."""

    embed_texts: EmbedTexts
    served_prompts: Callable[[], EncoderPrompts]

    @property
    def prompts(self) -> EncoderPrompts:
        return self.served_prompts()

    def embed(
        self, texts: Sequence[str], instruction: str | None = None, role: Role | None = None
    ) -> dict[str, NDArray[np.float32]]:
        return {"as served": self.embed_texts(texts, instruction, role)}


class Task(Protocol):
    """Data that is read and checked before any model is loaded."""

    def evaluate(self, model: str, vectors: Any) -> list[Score]: ...


def evaluate(asked: Asked, server: ServerVectors, models_dir: Path, progress: Progress) -> None:
    """Evaluate and print; scores go to stderr one by one as they are found, the tables to stdout at the end.

    `server` is that of `asked.url`; `models_dir` is where a recipe's encoder is kept; `progress` is told
    the bytes written and to be written of each encoder that is built.

    Raises:
        EvaluationError, DatasetError, ReportError: before anything is computed, but for data that mteb can't fetch.
        UserError: what building, loading and embedding raise.
    """
    _refuse_contradictions(asked)
    tasks = _tasks(asked)
    scores: list[Score] = []
    for name, load in _models(asked, server, models_dir, progress):
        scores += _scores(name, load(), tasks)
    print(table(scores))
    if asked.json:
        write_json(asked.json, scores, asdict(asked))
    if asked.picture:
        draw(asked.picture, scores)


def _scores(name: str, vectors: Any, tasks: Sequence[Task]) -> Iterator[Score]:
    """Each task's, of one model, which nothing holds any more when the next is loaded."""
    for task in tasks:
        for score in task.evaluate(name, vectors):
            print(f"{name}: {score.task}, {score.metric}, {score.setting}: {score.value:.4f}", file=sys.stderr)
            yield score


def _refuse_contradictions(asked: Asked) -> None:
    if not any((asked.sts, asked.words, asked.classification, asked.retrieval, asked.mteb)):
        raise EvaluationError("nothing to evaluate on: give --sts, --words, --classification, --retrieval or --mteb")
    if asked.url and (asked.pooling or asked.words):
        raise EvaluationError(
            f"{'--pooling' if asked.pooling else '--words'} needs the encoder itself, and a server gives text vectors "
            "under its own pooling: use --model DIR"
        )
    if asked.adapter and not asked.stages:
        raise EvaluationError("--adapter goes with --stages: for one encoder, build it first, then use --model DIR")
    for path in (asked.json, asked.picture):
        if path and not path.parent.is_dir():
            raise EvaluationError(f"{path.parent} is no folder: {path.name} can't be written there")
    if asked.picture:
        check_picture(asked.picture)


def _tasks(asked: Asked) -> list[Task]:
    tasks: list[Task] = [Sts(path, asked.instruction) for path in asked.sts]
    tasks += [Retrieval(folder, asked.query_instruction, asked.document_instruction) for folder in asked.retrieval]
    # Probes need scikit-learn, and MTEB its package: a server is evaluated on the others without.
    if asked.words or asked.classification:
        try:
            from model_store.evaluation.classification import Classification
            from model_store.evaluation.words import Words
        except ImportError as error:
            option = "--words" if asked.words else "--classification"
            raise EvaluationError(
                f"{option} needs scikit-learn ({error}): pip install 'llm2vec-service[eval]'"
            ) from error

        tasks += [Words(train, test, asked.probe_limit) for train, test in asked.words]
        tasks += [
            Classification(train, test, asked.instruction, asked.probe_limit) for train, test in asked.classification
        ]
    if asked.mteb:
        try:
            from model_store.evaluation.mteb_tasks import mteb_tasks
        except ImportError as error:
            raise EvaluationError(f"--mteb needs mteb ({error}): pip install 'llm2vec-service[eval]'") from error

        tasks += mteb_tasks(asked.mteb, asked.mteb_instructions)
    return tasks


def _models(
    asked: Asked, server: ServerVectors, models_dir: Path, progress: Progress
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, how to load its vectors) of what is evaluated, one after the other."""
    if asked.url:
        yield asked.url, lambda: server
        return

    from model_store.evaluation.local import LocalEncoder, each_stage

    poolings = asked.pooling or (STAGE_POOLINGS if asked.stages else ())
    load = partial(LocalEncoder.load, poolings=poolings, device=asked.device, dtype=asked.dtype)
    if asked.stages:
        recipe = load_recipe(asked.stages)
        if asked.adapter:
            recipe = recipe.model_copy(update={"adapters": tuple(asked.adapter)})
        yield from each_stage(recipe, load, progress)
        return
    assert asked.model, "the parser wants one of the three"
    folder = stored_encoder(asked.model, models_dir, progress)
    yield folder.resolve().name, partial(load, folder)


def stored_encoder(model: str, models_dir: Path, progress: Progress) -> Path:
    """The folder of a stored encoder, or of a recipe's, which is built in `models_dir` if needed."""
    from model_store.build.build import ensure_built

    folder = Path(model)
    if not folder.is_dir():
        recipe = load_recipe(model)
        folder = models_dir / recipe.name
        ensure_built(recipe, folder, progress)
    return folder
