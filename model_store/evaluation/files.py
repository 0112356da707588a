"""Reads evaluation files: plain or gzipped text, and JSON lines. Errors name the file and the line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model_store.errors import UserError
from model_store.text.files import checked, json_values, numbered_lines


class DatasetError(UserError):
    """An evaluation file that can't be read or used; the message names the file and, if there is one, the line."""


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file (gzipped if its name ends in .gz), without their ends, which are \n or \r\n.

    Raises:
        DatasetError: if the file does not exist or has another format.
    """
    return [line for _, line in checked(path, numbered_lines(path), DatasetError)]


def read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of each line that is not empty.

    Raises:
        DatasetError: for a line that is no JSON object, or that holds half of a surrogate pair.
    """
    for number, item in checked(path, json_values(numbered_lines(path)), DatasetError):
        if not isinstance(item, dict):
            raise DatasetError(f"{path}, line {number}: not a JSON object")
        yield number, item


def read_table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row by column name) of a .jsonl file, or a tab-separated file with a header and without quoting.

    Raises:
        DatasetError: for a line with fewer columns than the header, or a line that is no JSON object.
    """
    if ".jsonl" in path.suffixes or path.suffix == ".json":
        yield from read_json_lines(path)
        return
    lines = read_lines(path)
    header = lines[0].split("\t") if lines else []
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) < len(header):
            raise DatasetError(f"{path}, line {number}: {len(cells)} columns, the header has {len(header)}")
        yield number, dict(zip(header, cells, strict=False))


def text_field(path: Path, number: int, row: Mapping[str, Any], name: str, blank: bool = False) -> str:
    """A row's string. It may hold only white space if `blank` is true.

    Raises:
        DatasetError: if the row has no string of that name.
    """
    value = row.get(name)
    if not isinstance(value, str):
        found = f"only {', '.join(row) or 'nothing'}"
        if name in row:
            found = "it is null" if value is None else f"it is {value!r:.40}"
        raise DatasetError(f"{path}, line {number}: there is no text {name!r}, {found}")
    if not value.strip() and not blank:
        raise DatasetError(f"{path}, line {number}: {name} is empty, and an empty text has no vector")
    return value


def number_field(path: Path, number: int, row: Mapping[str, Any], name: str) -> float:
    """A row's finite number, which may be written as a string.

    Raises:
        DatasetError: if it has none of that name.
    """
    try:
        if math.isfinite(value := float(row[name])):
            return value
    except KeyError:
        raise DatasetError(f"{path}, line {number}: there is no {name!r}, only {', '.join(row)}") from None
    except (TypeError, ValueError, OverflowError):
        pass
    raise DatasetError(f"{path}, line {number}: {name} is {row[name]!r:.40}, not a number")
