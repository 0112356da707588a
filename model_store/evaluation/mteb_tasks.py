"""MTEB's tasks (Muennighoff et al. 2023) through the `mteb` package, for any source of text vectors.

It needs the extra `eval`. The `mteb` package fetches a task's data from the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from numpy.typing import NDArray

from model_store.evaluation.files import DatasetError
from model_store.evaluation.report import Score, TextVectors
from model_store.json_text import unicode_problem
from model_store.text.files import read_json


class MtebEncoder:
    """The encoder protocol of mteb 2 over text vectors.

    A text gets the task's instruction from `instructions`, or else mteb's own, with a colon at its end as in LLM2Vec's
    training. A document gets no instruction.
    """

    def __init__(self, name: str, vectors: TextVectors, instructions: dict[str, str] | None = None) -> None:
        self._vectors = vectors
        self._instructions = instructions or {}
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"llm2vec-service/{name}", "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> NDArray[np.float32]:
        """(n, D) vectors of the texts in mteb's batches, under the first setting."""
        texts = [text or " " for batch in inputs for text in batch["text"]]  # an empty text has no vector
        vectors = self._vectors.embed(texts, self._instruction(task_metadata, prompt_type))
        return next(iter(vectors.values()))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosines of all pairs of vectors."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosines of the vectors at the same place."""
        return pairwise_cos_sim(embeddings1, embeddings2)

    def _instruction(self, task: Any, prompt_type: Any) -> str:
        kind = None if prompt_type is None else str(prompt_type.value)
        if kind == "document":
            return ""
        prompt = self._instructions.get(task.name, task.prompt)
        if isinstance(prompt, dict):
            prompt = prompt.get(kind or "query")
        return f"{prompt.strip().rstrip('.:')}:" if prompt else ""


class MtebTask:
    """One of MTEB's tasks and its main score."""

    def __init__(self, task: Any, instructions: dict[str, str] | None = None) -> None:
        self._task, self._instructions = task, instructions

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        """A score for each split.

        Raises:
            DatasetError: if its data can't be loaded.
        """
        try:
            self._task.load_data()
        except Exception as error:  # the hub's client and the task's own code may raise anything
            name = self._task.metadata.name
            raise DatasetError(f"mteb can't load the data of {name} ({error}): it comes from the hub") from error
        encoder = MtebEncoder(model.replace("/", "_"), vectors, self._instructions)
        (result,) = mteb.evaluate(encoder, self._task, cache=None, show_progress_bar=False).task_results
        task = f"MTEB, {result.task_name}"
        metric = str(self._task.metadata.main_score)
        return [Score(model, task, metric, split, float(result.get_score(splits=[split]))) for split in result.scores]


def mteb_tasks(names: Sequence[str], instructions: Path | None = None) -> list[MtebTask]:
    """The tasks of these names. `instructions` is JSON, {task: instruction}, as in the official library.

    Raises:
        DatasetError: for a name that mteb does not know, or instructions that can't be read.
    """
    try:
        tasks = list(mteb.get_tasks(tasks=list(names)))
    except KeyError as error:
        raise DatasetError(f"mteb does not know the task: {error.args[0]}") from error
    own = _read_instructions(instructions) if instructions else None
    return [MtebTask(task, own) for task in tasks]


def _read_instructions(path: Path) -> dict[str, str]:
    found = read_json(path, DatasetError)
    if problem := unicode_problem(found):
        raise DatasetError(f"{path} {problem}")
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise DatasetError(f"{path} is not {{task: instruction}} in JSON")
    return found
