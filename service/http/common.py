"""What fields mean the same in all dialects, and the forms in which a text may be given. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from service.embedding.instructions import Chosen
from service.embedding.requests import EmbedInput
from service.errors import InvalidRequest

Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, max_length=200)]


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
