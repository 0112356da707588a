"""Limits RoPE whose frequencies depend on the length of a row to short rows, and fixes the frequencies of those.

transformers would choose the frequencies by the largest position of the whole packed row, so a text's vector would
depend on its batch mates. So an encoder reads no text that needs other frequencies, and its frequencies never change.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from model_store.errors import UserError

# RoPE types that have one set of frequencies for rows up to a border, and others beyond it. The border is
# max_position_embeddings for `dynamic` (NTK-aware scaling that grows with the row), and
# original_max_position_embeddings for `longrope` (Ding et al. 2024).
_BY_LENGTH = ("longrope", "dynamic")

# No type has this name, so transformers leaves the present frequencies alone.
_FIXED = "fixed"


class RopeError(UserError):
    """The stored encoder reads texts for which its frequencies would depend on batch mates."""


def readable_positions(config: Mapping[str, Any]) -> int:
    """The longest text, in tokens, that has the same frequencies as all shorter texts, by a decoder's config.json."""
    most: int = config["max_position_embeddings"]
    for parameters in _parameters(config):
        if _type(parameters) == "longrope":
            border = parameters.get("original_max_position_embeddings") or config.get(
                "original_max_position_embeddings"
            )
            most = min(most, border or most)
    return most


def limited_by(config: Mapping[str, Any]) -> str:
    """The RoPE type that makes an encoder read shorter texts than its base; empty if there is none."""
    if readable_positions(config) == config["max_position_embeddings"]:
        return ""
    return next(_type(parameters) for parameters in _parameters(config) if _type(parameters) in _BY_LENGTH)


def fix_frequencies(model: Any, max_positions: int) -> None:
    """Fix the frequencies of a loaded decoder that gets texts of at most `max_positions` tokens.

    Raises:
        RopeError: if texts of that length would change the frequencies.
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
    """One set of parameters for the whole decoder, or one for each type of layer. Older files call it rope_scaling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sets = [value for value in found.values() if isinstance(value, Mapping)]
    yield from sets or [found]


def _type(parameters: Mapping[str, Any]) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return "longrope" if kind == "su" else str(kind)
