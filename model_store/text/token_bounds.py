"""The most characters that one token can stand for: they prove that a text is too long without tokenizing it.

A tokenizer has this bound only if each of its steps is known never to drop characters.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

# Unicode composition joins at most four characters into one: U+1F82 is alpha and three marks.
_COMPOSED = 4
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def characters_per_token(tokenizer: Tokenizer) -> int | None:
    """The most characters per token of any text, not counting white space at its end; None if there is no bound."""
    parts = json.loads(tokenizer.to_str())
    factor = _normalizer(parts["normalizer"])
    model, added = parts["model"], parts["added_tokens"]
    if factor is None or not _keeps_all(parts["pre_tokenizer"]) or not _knows_all(model, parts["pre_tokenizer"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in added):  # such a token takes in any amount of white space
        return None
    return factor * max(map(len, (*model["vocab"], *(token["content"] for token in added))))


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for one in step[inner] for part in _steps(one, inner)] if step["type"] == "Sequence" else [step]


def _normalizer(normalizer: dict[str, Any] | None) -> int | None:
    """The most characters of a text that can become one; None if there is no limit."""
    factor = 1
    for step in _steps(normalizer, "normalizers"):
        match step:
            case {"type": "Prepend" | "ByteLevel"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(before)}, "content": str(after)}:
                if len(after) < len(before):
                    return None
            case {"type": kind} if kind in _NORMAL_FORMS:
                factor = _COMPOSED
            case _:
                return None
    return factor


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    return all(
        step["type"] in ("ByteLevel", "Metaspace", "Digits")
        or (step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed")
        for step in _steps(pre_tokenizer, "pretokenizers")
    )


def _knows_all(model: dict[str, Any], pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether every byte has a token, so that no text is dropped or joined into one unknown token."""
    if model["type"] != "BPE":
        return False
    vocabulary = model["vocab"]
    if any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer, "pretokenizers")):
        return all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
