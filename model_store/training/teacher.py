"""A teacher's vectors of the training texts: computed once, before the first step, and kept in output_dir.

The teacher is another encoder: a running server, a stored encoder, or one that sentence-transformers loads. It reads
each text in its role, as a query or as a document.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from model_store.evaluation.command import EmbedTexts
from model_store.evaluation.local import LocalEncoder
from model_store.manifest import MANIFEST_FILE, Role
from model_store.training.config import TrainingConfigError
from model_store.training.texts import Example, TrainingDataError

# W the teacher's width

_TEXTS_AT_ONCE = 1024

# A text, its instruction and its role.
Asked = tuple[str, str, Role]


@dataclass(frozen=True)
class TeacherVectors:
    """`vectors` (n, W) of length 1, and the place of each text among them."""

    places: Mapping[Asked, int]
    vectors: NDArray[np.float32]

    def of(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The vectors of all queries, and of all passages."""
        queries = [self.places[_query(each)] for each in examples]
        passages = [self.places[asked] for each in examples for asked in _passages(each)]
        return torch.from_numpy(self.vectors[queries]), torch.from_numpy(self.vectors[passages])


def teacher_vectors(
    examples: Sequence[Example], reference: str, load: Callable[[], EmbedTexts], folder: Path, width: int | None
) -> TeacherVectors:
    """The vectors of all texts, from a file in `folder`, or by the teacher that `load` loads: then the file is written.

    The file's name tells the texts and the teacher's `reference`.

    Raises:
        TrainingConfigError: if the teacher's vectors do not have the `width` that the loss needs.
        TrainingDataError: for a text whose vector is not finite.
        UserError: what the teacher raises.
    """
    each = (asked for example in examples for asked in (_query(example), *_passages(example)))
    places = {asked: place for place, asked in enumerate(dict.fromkeys(each))}
    content = hashlib.sha256(repr([reference, *places]).encode()).hexdigest()
    path = folder / f"teacher-{content[:16]}.npy"
    if not path.is_file():
        part = path.with_suffix(".part")
        _compute(places, load(), part, width)
        part.rename(path)
    return TeacherVectors(places, np.load(path, mmap_mode="r"))


def local_teacher(reference: str, device: torch.device) -> EmbedTexts:
    """A stored encoder in a folder, or an encoder that sentence-transformers loads.

    Raises:
        TrainingConfigError, UserError: if it can't be loaded.
    """
    if not (Path(reference) / MANIFEST_FILE).is_file():
        return _sentence_transformer(reference, device)
    encoder = LocalEncoder.load(Path(reference), device=str(device))

    def embed(texts: Sequence[str], instruction: str | None, role: Role | None) -> NDArray[np.float32]:
        (vectors,) = encoder.embed(texts, instruction, role).values()
        return vectors

    return embed


def _sentence_transformer(reference: str, device: torch.device) -> EmbedTexts:
    """An encoder that has prompts of its own for the roles, and no place for an instruction."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise TrainingConfigError(
            f"teacher_model needs another package ({error}): pip install sentence-transformers"
        ) from error
    try:
        model = SentenceTransformer(reference, device=str(device))
    except Exception as error:  # the hub's client, and every kind of model, fails in its own way
        raise TrainingConfigError(f"teacher_model {reference} can't be loaded: {error}") from error

    def embed(texts: Sequence[str], instruction: str | None, role: Role | None) -> NDArray[np.float32]:
        encode = model.encode_query if role == "query" else model.encode_document
        return np.asarray(encode(list(texts), show_progress_bar=False), dtype=np.float32)

    return embed


def _compute(places: Mapping[Asked, int], embed: EmbedTexts, path: Path, width: int | None) -> None:
    """Write the vectors of all texts to a file."""
    together: dict[tuple[str, Role], list[str]] = defaultdict(list)
    for text, instruction, role in places:
        together[instruction, role].append(text)
    vectors: np.memmap[Any, np.dtype[np.float32]] | None = None
    with tqdm(total=len(places), desc="teacher", unit="text", disable=None) as bar:
        for (instruction, role), texts in together.items():
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                some = texts[start : start + _TEXTS_AT_ONCE]
                found = embed(some, instruction or None, role)
                if vectors is None:
                    _check_width(found.shape[1], width)
                    shape = (len(places), found.shape[1])
                    vectors = np.lib.format.open_memmap(path, "w+", np.float32, shape)
                lengths = np.linalg.norm(found, axis=1, keepdims=True)
                for text, length in zip(some, lengths[:, 0], strict=True):
                    if not 0 < length < np.inf:
                        raise TrainingDataError(f"the teacher has no vector for the text that begins {text[:60]!r}")
                vectors[[places[text, instruction, role] for text in some]] = found / lengths
                bar.update(len(some))
    assert vectors is not None, "there are examples, or Order refuses them"
    vectors.flush()


def _check_width(found: int, needed: int | None) -> None:
    if needed is not None and found != needed:
        raise TrainingConfigError(
            f"the teacher has vectors of {found} dimensions and the base of {needed}: EmbedDistillLoss needs as many, "
            "DistillKLDivLoss and MarginMSELoss do not"
        )


def _query(example: Example) -> Asked:
    return example.query, example.instruction, "query"


def _passages(example: Example) -> list[Asked]:
    return [(text, example.passage_instruction, "document") for text in example.passages]
