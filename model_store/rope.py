"""RoPE whose frequencies depend on how long a row is: kept to those of short rows, and to rows that are short.

transformers chooses them by the largest position of the whole packed row: a text's vector would depend on its batch
mates. So an encoder reads no text for which they would change, and asks for no other frequencies. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from model_store.errors import UserError

# RoPE types that have one set of frequencies for rows up to a border, and others beyond it. The border of `dynamic`
# (NTK-aware scaling that grows with the row) is max_position_embeddings itself, that of `longrope` (Ding et al. 2024)
# original_max_position_embeddings.
_BY_LENGTH = ("longrope", "dynamic")

# The name of no type: transformers leaves the frequencies alone that it has made already.
_FIXED = "fixed"


class RopeError(UserError):
    """The stored encoder reads texts for which its frequencies would depend on batch mates."""


def readable_positions(config: Mapping[str, Any]) -> int:
    """The longest text, in tokens, that has the same frequencies as any shorter text, by a decoder's config.json."""
    most: int = config["max_position_embeddings"]
    for parameters in _parameters(config):
        if _type(parameters) == "longrope":
            border = parameters.get("original_max_position_embeddings") or config.get(
                "original_max_position_embeddings"
            )
            most = min(most, border or most)
    return most


def limited_by(config: Mapping[str, Any]) -> str:
    """The RoPE type that keeps an encoder from the length that its base reads; empty where none does."""
    if readable_positions(config) == config["max_position_embeddings"]:
        return ""
    return next(_type(parameters) for parameters in _parameters(config) if _type(parameters) in _BY_LENGTH)


def fix_frequencies(model: Any, max_positions: int) -> None:
    """Keep a loaded decoder, which was given rows of at most `max_positions`, to the frequencies that it has now.

    Raises:
        RopeError: if longer texts than those may be given would change them.
    """
    if max_positions > (most := readable_positions(model.config.to_dict())):
        raise RopeError(
            f"the stored encoder reads {max_positions} tokens, but beyond {most} its RoPE depends on the longest text "
            "of a batch: build it again"
        )
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = {layer: _FIXED if one in _BY_LENGTH else one for layer, one in kind.items()}
        elif kind in _BY_LENGTH:
            module.rope_type = _FIXED


def _parameters(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One set for the whole decoder, or one for each type of layer; older files call it rope_scaling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sets = [value for value in found.values() if isinstance(value, Mapping)]
    yield from sets or [found]


def _type(parameters: Mapping[str, Any]) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return "longrope" if kind == "su" else str(kind)
