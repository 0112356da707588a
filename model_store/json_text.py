"""JSON and strings of files that others wrote: what is wrong with them, in words that go behind their place."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """The value that a JSON text holds; strings in it may be no Unicode, see `unicode_problem`.

    Raises:
        ValueError: if it is not valid JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"is not valid JSON: {error.msg} at {line}column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise ValueError(f"is not valid JSON: {error}") from error


def unicode_problem(value: Any) -> str:
    """Why a string, or one within a JSON value, is no Unicode text; "" where all are.

    Bytes that are not UTF-8 are told by what `surrogateescape` makes of them.
    """
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        wrong = error.object[error.start]
        if "\udc80" <= wrong <= "\udcff":
            return "is not valid UTF-8"
        return f"holds \\u{ord(wrong):04x}, half of a surrogate pair, which is no character"
    return ""
