"""What the dialects share: the fields that mean the same in all of them, and the headers of an answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import StringConstraints

from service.embedding.embedder import Embedder, EmbedInput, EmbedResult
from service.embedding.instructions import Asked, Chosen, Instructions
from service.errors import InvalidRequest, ModelNotFound
from service.http.parts import parts_of

Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, max_length=200)]

# Of names that a client made up: how many are told, and in how many characters of a header.
_NAMED = 100
_HEADER_CHARACTERS = 1024

# An instruction of more characters is hashed each time: those of many clients would fill the memory.
_REMEMBERED_CHARACTERS = 1024

# Every header of an answer beside the usual ones, for pages of other origins that want to read them.
ANSWER_HEADERS = (
    "x-request-id",
    "x-embedding-space",
    "x-instruction-sha",
    "x-truncated-inputs",
    "x-ignored-fields",
    "x-requested-model",
    "x-token-ids-decoded",
    "x-compute-tokens",
    "x-total-time",
    "x-tokenization-time",
    "x-queue-time",
    "x-inference-time",
)


def instructions_of(request: Request) -> Instructions:
    """What this server knows of instructions."""
    return parts_of(request).instructions


def model_names(request: Request) -> list[str]:
    """What clients may call the one model that is served."""
    served = parts_of(request).served_name
    return [served, f"{served}:query", f"{served}:document", *instructions_of(request).aliases]


def alias_of(request: Request, model: str | None) -> str:
    """The role or prompt that a model's name asks for.

    Raises:
        ModelNotFound: if no model here has that name.
    """
    return instructions_of(request).alias_of(model, parts_of(request).served_name)


def check_model(request: Request, model: str, alias: str) -> None:
    """Look up a model by its name alone, where no instruction is asked for.

    Raises:
        ModelNotFound: if the role or prompt in the name does not exist.
    """
    if alias and not instructions_of(request).knows(alias):
        raise ModelNotFound(model, parts_of(request).served_name)


def asked_model(request: Request, model: str | None) -> dict[str, str]:
    """The header that says by which other name the served model was asked for."""
    if model is None or model == parts_of(request).served_name:
        return {}
    return {"x-requested-model": _header_text(model[:200])}


def choose_instruction(
    request: Request, instruction: str | None = None, names: Mapping[str, str | None] | None = None, alias: str = ""
) -> Chosen:
    """The instruction for the inputs that bring none themselves, from fields, the model's alias, headers or settings.

    Raises:
        InvalidRequest: for a name that there is not, or two that contradict each other.
    """
    headers = request.headers
    asked = Asked(
        instruction,
        {field: name for field, name in (names or {}).items() if name},
        alias,
        _utf8(headers.get("x-instruction")),
        headers.get("x-input-type"),
    )
    return instructions_of(request).choose(asked)


def with_instruction(texts: Iterable[str | Sequence[int]], chosen: Chosen, separator: str) -> list[EmbedInput]:
    """Inputs of one instruction, unless a text holds the separator: what stands before it is its own then."""
    if not separator:
        return [EmbedInput(text, chosen) for text in texts]
    return [split_text(text, chosen, separator) for text in texts]


def split_text(text: str | Sequence[int], chosen: Chosen, separator: str) -> EmbedInput:
    """An input by the in-band separator."""
    if separator and isinstance(text, str) and separator in text:
        instruction, _, rest = text.partition(separator)
        return EmbedInput(rest, Chosen(instruction.strip(), "text"))
    return EmbedInput(text, chosen)


def answer_headers(
    embedder: Embedder, inputs: Sequence[EmbedInput], result: EmbedResult, total: float
) -> dict[str, str]:
    """What an answer says of itself, in all dialects; times are in milliseconds."""
    return {
        "x-embedding-space": embedder.manifest.embedding_space,
        "x-instruction-sha": instruction_sha({item.instruction.text for item in inputs}),
        "x-compute-tokens": str(result.prompt_tokens),
        "x-truncated-inputs": str(result.truncated_inputs),
        "x-total-time": _milliseconds(total),
        "x-tokenization-time": _milliseconds(result.tokenize_seconds),
        "x-queue-time": _milliseconds(result.queue_seconds),
        "x-inference-time": _milliseconds(result.inference_seconds),
    }


def instruction_sha(instructions: set[str]) -> str:
    """A short hash of the instruction that all inputs got: `none`, or `mixed` where it was not the same."""
    if len(instructions) != 1:
        return "mixed"
    (instruction,) = instructions
    if not instruction:
        return "none"
    return (_sha if len(instruction) <= _REMEMBERED_CHARACTERS else _sha.__wrapped__)(instruction)


def ignored_fields(embedder: Embedder, names: Iterable[str]) -> dict[str, str]:
    """The header that names fields nobody knows; they are counted.

    Raises:
        InvalidRequest: instead, where the settings say so.
    """
    ignored = sorted(names)
    if not ignored:
        return {}
    if embedder.settings.reject_unknown_fields:
        raise InvalidRequest(f"unknown fields: {', '.join(ignored[:_NAMED])}", "unknown_field", ignored[0])
    embedder.metrics.ignored_fields.inc(len(ignored))
    shown = ", ".join(_header_text(name[:_HEADER_CHARACTERS]) for name in ignored[:_NAMED])
    return {"x-ignored-fields": shown[:_HEADER_CHARACTERS]}


def truncation(truncate: bool | str | None) -> Literal["start", "end"] | None:
    """Which part of a too long text stays, by the word for what goes; None where nothing may go.

    Raises:
        InvalidRequest: for a word that is not NONE, START or END.
    """
    if truncate is None or truncate is False:
        return None
    if truncate is True:
        return "start"
    keep: dict[str, Literal["start", "end"] | None] = {"NONE": None, "END": "start", "START": "end"}
    if truncate.upper() not in keep:
        raise InvalidRequest(
            f"truncate is {truncate[:100]!r}: use true or false, or NONE, START or END", "invalid_value", "truncate"
        )
    return keep[truncate.upper()]


def as_items(value: Any) -> list[Any]:
    """A list as it is, anything else as the one item of one."""
    return value if isinstance(value, list) else [value]


def are_ids(value: Any) -> bool:
    """Whether this is one text's token ids: a list of whole numbers, and at least one."""
    return isinstance(value, list) and set(map(type, value)) == {int}


@lru_cache(maxsize=1024)
def _sha(instruction: str) -> str:
    return hashlib.sha256(instruction.encode()).hexdigest()[:16]


def _utf8(header: str | None) -> str | None:
    """A header's text: the framework takes its bytes for Latin-1."""
    return None if header is None else header.encode("latin-1").decode(errors="replace")


def _header_text(name: str) -> str:
    """A client's word in a header: nothing in it may end the header or begin another."""
    return re.sub(r"[^\x21-\x7e]", "?", name)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"
