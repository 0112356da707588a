"""Fields that mean the same in all dialects, and the forms in which a client may give a text. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.embedding.instructions import Chosen
from service.embedding.requests import EmbedInput
from service.errors import InvalidRequest

Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, max_length=200)]
ModelName = Annotated[
    str | None,
    Field(description="the served model's name, or `name:query`, `name:document`, `name:` and a prompt's name"),
]
Dimensions = Annotated[
    int | None,
    Field(strict=True, description="cut vectors to this many dimensions: one of the model's `widths`, if it has any"),
]


class RequestBody(BaseModel):
    """A body that keeps its unknown fields, for `Call.ignore`."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


def split_text(text: str | Sequence[int], chosen: Chosen, separator: str) -> EmbedInput:
    """An input, split at the separator if the text holds it."""
    if separator and isinstance(text, str) and separator in text:
        instruction, _, rest = text.partition(separator)
        return EmbedInput(rest, Chosen(instruction.strip(), "text"))
    return EmbedInput(text, chosen)


def truncation(truncate: bool | str | None) -> Literal["start", "end"] | None:
    """The part of a too long text that stays, by the dialect's word for the part that goes; None if none may go."""
    if not isinstance(truncate, str):
        return "start" if truncate else None
    keep: dict[str, Literal["start", "end"] | None] = {"NONE": None, "END": "start", "START": "end"}
    if truncate.upper() not in keep:
        raise InvalidRequest(
            f"truncate is {truncate[:100]!r}: use true or false, or NONE, START or END", "invalid_value", "truncate"
        )
    return keep[truncate.upper()]


def are_ids(value: Any) -> bool:
    """Whether this is one text's token ids: a list of whole numbers, and at least one."""
    return isinstance(value, list) and set(map(type, value)) == {int}
