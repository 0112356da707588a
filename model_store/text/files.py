"""Text files that others wrote: UTF-8, gzipped where the name ends in .gz, and JSON lines.

A byte order mark at the beginning is left out. A line that can't be read is a `BadText` in its place, so that a reader
can report it and go on; `checked` raises instead.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, TypeVar

from model_store.errors import UserError
from model_store.json_text import parse_json, unicode_problem

_UTF8_MARK = b"\xef\xbb\xbf"

Value = TypeVar("Value")

# An error's class.
Failure = Callable[[str], UserError]


class BadText(str):
    """What is wrong with bytes that should have been a text, in words that go behind their place."""


def numbered_lines(path: Path, most_bytes: int = -1) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line) without its end, which is \n or \r\n; `BadText` for one not in UTF-8 or too long."""
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(most_bytes):
            number += 1
            if len(line) == most_bytes and not line.endswith(b"\n"):
                while (rest := file.readline(most_bytes)) and not rest.endswith(b"\n"):
                    pass
                yield number, _too_long(most_bytes)
            else:
                own = line.removeprefix(_UTF8_MARK) if number == 1 else line
                yield number, _decoded(own.removesuffix(b"\n").removesuffix(b"\r"))


def json_values(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank; `BadText` for a line that is not JSON.

    Strings in a value may hold lone surrogates: see `unicode_problem`.
    """
    for number, line in lines:
        if isinstance(line, BadText):
            yield number, line
        elif line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, BadText(error)


def checked(
    path: Path, values: Iterable[tuple[int, Value]], failure: Failure, unit: str = "line"
) -> Iterator[tuple[int, Value]]:
    """The values of a file, all of whose strings are Unicode text.

    Raises:
        UserError: `failure`, for the first value that is not; it names the file and the value's number.
    """
    with readable(path, failure):
        for number, value in values:
            if problem := value if isinstance(value, BadText) else unicode_problem(value):
                raise failure(f"{path}, {unit} {number} {problem}")
            yield number, value


def read_text(path: Path, most_bytes: int) -> str:
    """All of a file; `BadText` if it is not UTF-8, or is too long."""
    with open_bytes(path) as file:
        content = file.read(most_bytes + 1)
    return _too_long(most_bytes) if len(content) > most_bytes else _decoded(content.removeprefix(_UTF8_MARK))


def open_bytes(path: Path) -> BufferedReader | gzip.GzipFile:
    """The bytes of a file as they were before it was gzipped."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def open_text(path: Path) -> TextIOWrapper:
    """The text of a file with its line ends. Bytes that are not UTF-8 become lone surrogates: see `unicode_problem`."""
    return TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


@contextmanager
def readable(path: Path, failure: Failure, *also: type[Exception]) -> Iterator[None]:
    """Raises `failure` in place of the errors of files and of gzip, and of `also`."""
    unreadable: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *also)
    try:
        yield
    except UserError:
        raise
    except unreadable as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise failure(f"{path} can't be read: {told}") from error


def read_json(path: Path, failure: Failure) -> Any:
    """The JSON value in a file. Strings in it may hold lone surrogates: see `unicode_problem`.

    Raises:
        UserError: `failure`, if the file can't be read or is not valid JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise failure(f"{path} can't be read: {error}") from error
    except ValueError as error:
        raise failure(f"{path} {error}") from error


def _too_long(most_bytes: int) -> BadText:
    return BadText(f"has more than {most_bytes} bytes")


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return BadText(f"is not valid UTF-8: {error.reason} at byte {error.start}")


@contextmanager
def appearing_whole(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write, which takes its place when the context ends, and is removed after an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
