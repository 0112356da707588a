"""Reads JSON and strings from other programs' files. An error is a phrase that can follow the name of its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_store.errors import CheckpointError

# The beginning of the file that Git LFS puts in place of a large file that was not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def parse_json(text: str) -> Any:
    """The value of a JSON text. Strings in it may be invalid Unicode: see `unicode_problem`.

    Raises:
        ValueError: if it is not valid JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"is not valid JSON: {error.msg} at {line}column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or deeply nested brackets
        raise ValueError(f"is not valid JSON: {error}") from error


def unicode_problem(value: Any) -> str:
    """Why a string, or a string within a JSON value, is no valid Unicode; "" if all strings are valid.

    Bytes that are not UTF-8 are recognized by the characters that `surrogateescape` makes of them.
    """
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        wrong = error.object[error.start]
        if "\udc80" <= wrong <= "\udcff":
            return "is not valid UTF-8"
        return f"holds \\u{ord(wrong):04x}, half of a surrogate pair, which is no character"
    return ""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a base or an adapter.

    Raises:
        CheckpointError: if the file holds anything else.
    """
    with reading(path, "is not valid JSON", ValueError):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw


def refuse_lfs_pointer(path: Path) -> None:
    """Raises a `CheckpointError` for a file that only names the content that Git LFS would fetch in its place."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(f"{path} is a Git LFS pointer: fetch it with git lfs pull")


@contextmanager
def reading(
    path: Path, complaint: str, errors: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Raises a `CheckpointError` in place of other errors, which says the path, `complaint` and the cause.

    torch, transformers, tokenizers and gguf raise a dozen unrelated types for bad content.
    """
    try:
        yield
    except errors as error:
        refuse_lfs_pointer(path)
        told = " ".join(str(error).split())
        if isinstance(error, KeyError) and " " not in told:
            told = f"unknown value {told}"
        raise CheckpointError(f"{path} {complaint}: {told}") from error
