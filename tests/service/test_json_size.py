"""The size of JSON documents, against what a parser finds in them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from service.http.json_size import JSONSize, json_size


def counted(value: Any) -> JSONSize:
    """The commas and containers that a value is written with."""
    if isinstance(value, dict):
        parts = [counted(part) for part in value.values()]
        own = JSONSize(max(len(parts) - 1, 0), 1 + len(parts))
    elif isinstance(value, list):
        parts = [counted(part) for part in value]
        own = JSONSize(max(len(parts) - 1, 0), 1)
    else:
        return JSONSize(0, 0)
    return JSONSize(*map(sum, zip(own, *parts, strict=True)))


def anything(chance: random.Random, depth: int = 0) -> Any:
    text = "".join(chance.choices('\\"[]{},:aé日\n\t😀', k=chance.choice((0, 1, 3, 40))))
    if depth == 4 or chance.random() < 0.4:
        return chance.choice((text, 1, -2.5e7, None, True))
    if chance.random() < 0.5:
        return [anything(chance, depth + 1) for _ in range(chance.randrange(6))]
    return {f"{text}{number}": anything(chance, depth + 1) for number in range(chance.randrange(6))}


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64, 1 << 18])
def test_values_are_counted_and_what_strings_hold_is_not(at_once: int) -> None:
    chance = random.Random(at_once)
    for _ in range(300 if at_once > 3 else 60):
        value = anything(chance)
        for ascii_only in (True, False):
            for indent in (None, 1):
                body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
                assert json_size(body, at_once) == counted(value), body


def test_a_string_that_never_ends_holds_no_values() -> None:
    assert json_size(b'[1,2,"' + b"," * 100) == (2, 1)
    assert json_size(b"") == (0, 0)
