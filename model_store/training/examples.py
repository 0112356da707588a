"""Chooses the examples of each batch, and makes batches from them.

An example's place in a run, (epoch, index), decides everything about it: the order is a function of seed and epoch, and
the masking is a function of seed, epoch and index. So an interrupted run goes on with exactly the same batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from model_store.encoder.packing import PackedBatch
from model_store.pooling_modes import PoolingMode
from model_store.text.tokenizer import TextTokenizer, TokenizationError, TokenizedText
from model_store.training.teacher import TeacherVectors
from model_store.training.texts import Example, TrainingDataError

# T packed tokens, B texts

# The epoch number that masks the examples of an evaluation.
EVALUATION = 1 << 30

# The label of a token that is not predicted.
NO_LABEL = -100

Place = tuple[int, int]


class Order(Sampler[Place]):
    """Every example once an epoch, shuffled. A batch never mixes examples of two groups.

    In each group the last examples that don't fill a batch are left out. `batch` counts all processes together.
    """

    def __init__(self, groups: Sequence[str], batch: int, seed: int) -> None:
        members: dict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            members[group].append(index)
        self._groups = [np.array(indices) for indices in members.values()]
        self._batch, self._seed, self._epoch = batch, seed, 0
        if not len(self):
            raise TrainingDataError(f"{len(groups)} examples don't fill a batch of {batch}: give more, or lower it")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(len(group) // self._batch for group in self._groups) * self._batch

    def __iter__(self) -> Iterator[Place]:
        generator = np.random.default_rng([self._seed, self._epoch])
        batches: list[NDArray[np.int64]] = []
        for group in self._groups:
            shuffled = generator.permutation(group)
            batches += np.array_split(
                shuffled[: len(shuffled) // self._batch * self._batch], len(shuffled) // self._batch or 1
            )
        for number in generator.permutation(len(batches)):
            yield from ((self._epoch, int(index)) for index in batches[number])


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden: each with `probability`, replaced by `mask_token`.

    With `mixed`, 80 % of the hidden tokens become the mask token, 10 % become a random token and 10 % stay as they are
    (Devlin et al. 2019). `untouched` (vocabulary,) bool marks the tokens that are never hidden.
    """

    mask_token: int
    probability: float
    mixed: bool
    untouched: NDArray[np.bool_]
    seed: int

    def of(self, token_ids: NDArray[np.int64], place: Place) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A row with its hidden tokens replaced, and its labels: the hidden token at each place, or NO_LABEL.

        The first token can be hidden too, but nothing predicts it.
        """
        generator = np.random.default_rng([self.seed, 1, *place])
        hidden = (generator.random(len(token_ids)) < self.probability) & ~self.untouched[token_ids]
        draw = generator.random(len(token_ids)) if self.mixed else np.zeros(len(token_ids))
        shown = np.where(hidden & (draw < 0.8), self.mask_token, token_ids)
        if self.mixed:
            random = generator.integers(len(self.untouched), size=len(token_ids))
            shown = np.where(hidden & (draw >= 0.9), random, shown)
        labels = np.where(hidden, token_ids, NO_LABEL)
        labels[0] = NO_LABEL
        return shown, labels


class TokenRows(Dataset[tuple[NDArray[np.int64], Place]]):
    """Rows of token ids, end to end in one array of 32-bit integers."""

    def __init__(self, rows: Sequence[NDArray[np.int32]]) -> None:
        self._ends = np.cumsum([0, *map(len, rows)])
        self._tokens = np.concatenate([np.empty(0, dtype=np.int32), *rows])

    @classmethod
    def in_blocks(cls, rows: Sequence[NDArray[np.int32]], length: int) -> TokenRows:
        """All rows end to end, cut into blocks of `length`; an incomplete block at the end is dropped."""
        whole = cls(rows)
        whole._ends = np.arange(0, len(whole._tokens) + 1, length)
        return whole

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: Place) -> tuple[NDArray[np.int64], Place]:
        start, end = self._ends[place[1] : place[1] + 2]
        return self._tokens[start:end].astype(np.int64), place


@dataclass(frozen=True)
class ExampleDataset(Dataset[Example]):
    """Examples as a dataset."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: Place) -> Example:
        return self.examples[place[1]]


@dataclass(frozen=True)
class MaskedBatches:
    """Collates rows into one packed batch: token_ids, position_ids, labels (1, T), cu_seqlens, longest."""

    masking: Masking

    def __call__(self, rows: list[tuple[NDArray[np.int64], Place]]) -> dict[str, Any]:
        """A batch as keywords of `MaskedNextToken.forward`."""
        masked = [self.masking.of(*row) for row in rows]
        packed = PackedBatch.pack([TokenizedText(list(shown), 0) for shown, _ in masked], "mean")
        labels = torch.from_numpy(np.concatenate([labels for _, labels in masked]))
        return {**as_inputs(packed), "labels": labels}


@dataclass(frozen=True)
class ContrastiveBatches:
    """Collates examples into packed chunks of at most `chunk` texts: all queries, then each query's passages in turn.

    The other keys of a batch are the fields of `TextBatch` that are not trained.
    """

    tokenizer: TextTokenizer
    pooling: PoolingMode
    longest: int
    chunk: int | None
    teacher: TeacherVectors | None = None

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """A batch: `chunks` are for `ContrastiveEncoder.forward`, and `beside` is for the loss."""
        rows = self._rows([each.query for each in examples], [each.instruction for each in examples])
        passages = [text for each in examples for text in each.passages]
        instructions = [each.passage_instruction for each in examples for _ in each.passages]
        rows += self._rows(passages, instructions)
        sizes = [len(each.passages) for each in examples]
        beside = {
            "owners": torch.arange(len(examples)).repeat_interleave(torch.tensor(sizes)),
            "positive": torch.tensor([n < len(each.positives) for each in examples for n in range(len(each.passages))]),
        }
        if examples[0].scores:
            beside["scores"] = torch.tensor([score for each in examples for score in each.scores])
        if self.teacher is not None:
            beside["taught_queries"], beside["taught_passages"] = self.teacher.of(examples)
        return {"chunks": self._chunks(rows), "queries": len(examples), "beside": beside}

    def of_texts(self, texts: list[str]) -> dict[str, Any]:
        """A batch of texts alone, without instructions."""
        return {"chunks": self._chunks(self._rows(texts, [""] * len(texts)))}

    def _chunks(self, rows: list[TokenizedText]) -> list[dict[str, Any]]:
        size = self.chunk or len(rows)
        chunks = [PackedBatch.pack(rows[start : start + size], self.pooling) for start in range(0, len(rows), size)]
        return [dict(vars(chunk)) for chunk in chunks]

    def _rows(self, texts: list[str], instructions: list[str]) -> list[TokenizedText]:
        try:
            rows = self.tokenizer.encode_batch(texts, instructions)
        except TokenizationError as error:
            raise TrainingDataError(f"{error}, in the text that begins {texts[error.index][:60]!r}") from error
        return [row.shortened(self.longest) for row in rows]


def as_inputs(batch: PackedBatch) -> dict[str, Any]:
    """The fields of a packed batch that a decoder gets."""
    return {name: getattr(batch, name) for name in ("token_ids", "position_ids", "cu_seqlens", "longest")}
