"""MTEB's tasks (Muennighoff et al. 2023) through the `mteb` package, for any source of text vectors.

It needs the extra `eval`. The `mteb` package fetches a task's data from the hub.
"""

from __future__ import annotations

import re
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
from model_store.manifest import Role
from model_store.templates import VERBATIM, Template
from model_store.text.files import read_json
from model_store.text.prompts import EncoderPrompts, UnknownPrompt, find_prompt


class MtebEncoder:
    """The encoder protocol of mteb 2 over text vectors.

    Queries, and texts of tasks without queries, get the task's instruction from `instructions`, else the one that
    `task_instruction` chooses.
    """

    def __init__(self, name: str, vectors: TextVectors, instructions: dict[str, str] | None = None) -> None:
        self._vectors, self._prompts = vectors, vectors.prompts
        self._instructions = instructions or {}
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"llm2vec-service/{name}", "similarity_fn_name": ScoringFunction.COSINE}
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> NDArray[np.float32]:
        """(n, D) vectors of the texts in mteb's batches, under the first setting."""
        texts = [text or " " for batch in inputs for text in batch["text"]]  # an empty text has no vector
        role: Role | None = None if prompt_type is None else prompt_type.value
        instruction = self._instructions.get(task_metadata.name)
        if instruction is None or role == "document":
            instruction = task_instruction(self._prompts, task_metadata, role)
        vectors = self._vectors.embed(texts, instruction, role)
        return next(iter(vectors.values()))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosines of all pairs of vectors."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosines of the vectors at the same place."""
        return pairwise_cos_sim(embeddings1, embeddings2)


def task_instruction(prompts: EncoderPrompts, task: Any, role: Role | None) -> str | None:
    """The instruction of a task's texts; None for the encoder's own of the role, or its default prompt.

    The first that there is: the encoder's prompt under the task's name; mteb's instruction, for an encoder that has a
    place for one; the encoder's prompt under the task's type. LLM2Vec's encoders have the packaged prompts, of which
    some stand for types, as in mteb's own evaluation of LLM2Vec.
    """
    named = _prompt(prompts, task.name, role)
    if named is None and prompts.lead != VERBATIM and role != "document":
        given = task.prompt.get(role or "query") if isinstance(task.prompt, dict) else task.prompt
        # LLM2Vec was trained with a colon at the end of each instruction.
        named = f"{given.strip().rstrip('.:')}:" if given and prompts.lead == Template().lead else given
    if named is None:
        named = _prompt(prompts, task.type, role)
    return named


def _prompt(prompts: EncoderPrompts, name: str, role: Role | None) -> str | None:
    """The prompt of a task or type, under its name or as mteb and sentence-transformers name that of one role."""
    in_words = re.sub("(?<=[a-z])(?=[A-Z])", "-", name)
    for known in (f"{name}-{role}", name, in_words):
        try:
            found = find_prompt(prompts.by_name, known)
        except UnknownPrompt:
            continue
        return found.document if role == "document" else found.query
    return None


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
