"""The headers of an answer that say how it was made, the same in all dialects."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

from service.embedding.embedder import Embedder
from service.embedding.requests import EmbedInput, EmbedResult

# How many names from a client an answer tells, and in how many characters of a header.
MOST_NAMED = 100
_HEADER_CHARACTERS = 1024

# An instruction of more characters is hashed each time: those of many clients would fill the memory.
_REMEMBERED_CHARACTERS = 1024

# Every header of an answer beside the usual ones, for pages of other origins that want to read them.
ANSWER_HEADERS = (
    "x-request-id",
    "x-embedding-space",
    "x-instruction-sha",
    "x-truncated-inputs",
    "x-model-widths",
    "x-ignored-fields",
    "x-requested-model",
    "x-token-ids-decoded",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
)


def answer_headers(
    embedder: Embedder, inputs: Sequence[EmbedInput], result: EmbedResult, total: float
) -> dict[str, str]:
    """The headers of an answer in all dialects. Times are in milliseconds."""
    manifest = embedder.manifest
    return {
        "x-embedding-space": manifest.embedding_space,
        "x-instruction-sha": instruction_sha({item.instruction.text for item in inputs}),
        "x-compute-tokens": str(result.prompt_tokens),
        "x-truncated-inputs": str(result.truncated_inputs),
        **_other_width(manifest.widths, result),
        "x-total-time": _milliseconds(total),
        "x-tokenization-time": _milliseconds(result.timings.tokenize_seconds),
        "x-queue-time": _milliseconds(result.timings.queue_seconds),
        "x-inference-time": _milliseconds(result.timings.inference_seconds),
    }


def instruction_sha(instructions: set[str]) -> str:
    """A short hash of the instruction that all inputs got; `none` without one, `mixed` for several."""
    if len(instructions) != 1:
        return "mixed"
    (instruction,) = instructions
    if not instruction:
        return "none"
    return (_sha if len(instruction) <= _REMEMBERED_CHARACTERS else _sha.__wrapped__)(instruction)


def ignored_header(names: Sequence[str]) -> str:
    """Names from a client, as many as a header can tell."""
    shown = ", ".join(header_text(name[:_HEADER_CHARACTERS]) for name in names[:MOST_NAMED])
    return shown[:_HEADER_CHARACTERS]


def header_text(name: str) -> str:
    """A client's word in a header: nothing in it may end the header or begin another."""
    return re.sub(r"[^\x21-\x7e]", "?", name)


@lru_cache(maxsize=1024)
def _sha(instruction: str) -> str:
    return hashlib.sha256(instruction.encode()).hexdigest()[:16]


def _other_width(widths: Sequence[int], result: EmbedResult) -> dict[str, str]:
    """The model's widths, where the vectors were cut to another one; else nothing."""
    if not widths or not result.vectors or result.vectors[0].shape[-1] in widths:
        return {}
    return {"x-model-widths": ", ".join(map(str, widths))}


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"
