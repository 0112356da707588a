"""The requests that dialects hand to the embedder, and the results they get back. Plain data; no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from model_store.text.openai_tokens import OpenAIEncoding
from model_store.text.tokenizer import Part
from service.batching.contract import Computed
from service.batching.scheduling import Lane
from service.embedding.choices import Overflow
from service.embedding.instructions import NONE, Chosen
from service.embedding.rows import EmbedRow, Vector

# The vocabulary of token ids that stand in the place of texts: this model's own, or OpenAI's.
TokenIds = Literal["model"] | OpenAIEncoding

TextOrIds = str | Sequence[int]


class EmbedInput(NamedTuple):
    """A text, or the ids of its tokens, and its instruction."""

    text: TextOrIds
    instruction: Chosen = NONE


@dataclass(frozen=True)
class EmbedRequest:
    """Inputs to embed, and the ways to do it.

    `param` and `dimensions_param` are the caller's own names for the two fields, for error messages.
    """

    inputs: Sequence[EmbedInput]
    dimensions: int | None = None
    overflow: Overflow = "error"
    keep: Literal["start", "end"] = "start"  # the part of a cut text that stays
    normalize: bool = True
    each_token: bool = False  # a vector for each token of an input, instead of one vector
    token_ids: TokenIds = "model"
    lane: Lane | None = None  # None: chosen by the request's size
    timeout_seconds: float | None = None
    wait_seconds: float = 0.0  # the longest wait for room in the queue before the request is refused
    param: str = "input"
    dimensions_param: str = "dimensions"
    beside: int = 0  # inputs that the caller does not count as inputs, such as the query beside its texts

    @cached_property
    def characters(self) -> int:
        """Characters of all texts and all instructions."""
        texts = sum(len(item.text) for item in self.inputs if isinstance(item.text, str))
        return texts + sum(len(item.instruction.text) for item in self.inputs)

    @cached_property
    def ids(self) -> int:
        """Token ids that stand in the place of texts."""
        return sum(len(item.text) for item in self.inputs if not isinstance(item.text, str))


@dataclass(frozen=True)
class Timings:
    """Seconds that a request spent in each stage."""

    tokenize_seconds: float = 0.0  # with the wait for room in the queue
    queue_seconds: float = 0.0  # of the input that waited longest
    inference_seconds: float = 0.0  # of the slowest batch that held one of the inputs

    def steps(self) -> list[tuple[str, float]]:
        return [
            ("tokenize", self.tokenize_seconds),
            ("queue", self.queue_seconds),
            ("inference", self.inference_seconds),
        ]


@dataclass(frozen=True)
class EmbedResult:
    """Float32 vectors in the order of the inputs, and the cost of all of them together.

    Each input has a vector of shape (width,), or (tokens, width) if the request asked for a vector of each token.
    """

    vectors: Sequence[Vector]
    prompt_tokens: int
    truncated_inputs: int
    timings: Timings

    @classmethod
    def of(
        cls,
        rows: Sequence[EmbedRow],
        computed: Sequence[Computed[Vector]],
        truncated_inputs: int,
        tokenize_seconds: float,
    ) -> EmbedResult:
        queue = max(item.queue_seconds for item in computed)
        inference = max(item.inference_seconds for item in computed)
        timings = Timings(tokenize_seconds, queue, inference)
        return cls([item.vector for item in computed], sum(map(len, rows)), truncated_inputs, timings)


@dataclass(frozen=True)
class ChunkResult(EmbedResult):
    """As `EmbedResult`, with the characters and the number of tokens of each chunk."""

    spans: Sequence[tuple[int, int]]
    tokens: Sequence[int]


@dataclass(frozen=True)
class PreviewToken:
    """A token: how the vocabulary spells it, its text, its origin, and whether it is pooled or cut off."""

    id: int
    token: str
    text: str
    part: Part
    pooled: bool
    cut: bool


@dataclass(frozen=True)
class LocatedTokens:
    """A row before anything is cut, and the characters [start, end) of `text` that each of its tokens stands for.

    `text` begins with the instruction. `own` are the places of its tokens; all other tokens stand around every text,
    and for no characters.
    """

    text: str
    token_ids: Sequence[int]
    characters: Sequence[tuple[int, int]]
    own: range


def is_empty(text: TextOrIds) -> bool:
    """Whether a text has no characters but white space, or a list of ids no ids."""
    return not text or (isinstance(text, str) and text.isspace())
