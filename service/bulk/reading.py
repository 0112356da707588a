"""Reads rows of texts from files, one after the other. It holds no more than a row, or a piece of parquet, in memory.

A row that can't be embedded is a value like any other, with its line and the reason. A file that can't be read raises.
This module knows nothing of encoders, and loads pyarrow only for a parquet file.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from model_store.errors import UserError
from model_store.json_text import unicode_problem
from model_store.text.files import BadText, json_values, numbered_lines, open_text, read_text, readable

if TYPE_CHECKING:
    import pyarrow

# lines: each line is a text; files: a folder whose files are a text each, or one such file.
Kind = Literal["jsonl", "csv", "tsv", "parquet", "lines", "files"]

# The kind by the file's name. A `.txt` file is read as one text a line; in a folder, each is one text.
_KIND_OF_SUFFIX: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "lines",
}

# The column with the path of a text that is a file of its own.
PATH_COLUMN = "path"

# A longer line, field or file is a mistake and no text, such as a quote that is never closed.
MOST_BYTES = 1 << 26

# Rows of parquet that are made Python objects at once.
_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 1 << 20


class InputError(UserError):
    """A file that can't be read or lacks a column; the message names it, and the line if there is one."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read: the text, and the columns that are stored beside its vector."""

    text: str = "text"
    id: str | None = None
    carried: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """All columns but the text."""
        return ((self.id,) if self.id else ()) + self.carried


@dataclass(frozen=True)
class Row:
    """A text, its line (from 1), and the values of `Columns.beside`; `missing` are the carried columns it lacks."""

    line: int
    text: str
    values: tuple[Any, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that can't be embedded, and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Input:
    """A file, or a folder whose files are a text each. No line, field or text may have more than `most_bytes`."""

    path: Path
    kind: Kind
    most_bytes: int = MOST_BYTES

    def place(self, line: int) -> tuple[Path, int | None]:
        """The file of a row, and its line there; None if the file is the row."""
        return (self.files()[line - 1], None) if self.kind == "files" else (self.path, line)

    def where(self, line: int) -> str:
        """The place of a row, in words."""
        path, line_there = self.place(line)
        unit = "row" if self.kind == "parquet" else "line"
        return str(path) if line_there is None else f"{path}, {unit} {line_there}"

    def files(self) -> list[Path]:
        """The files that it consists of, in order."""
        return _files_in(self.path) if self.path.is_dir() else [self.path]

    def names(self, columns: Columns) -> Sequence[str] | None:
        """The columns of every row; None if rows may differ in them."""
        with _readable(self.path):
            if self.kind == "parquet":
                return cast(Sequence[str], _parquet(self.path).schema_arrow.names)
            if self.kind in ("csv", "tsv"):
                with open_text(self.path) as file:
                    return next(_cells(self, file), (0, []))[1]
        return {"lines": [columns.text], "files": [PATH_COLUMN, columns.text]}.get(self.kind)

    def type_of(self, column: str) -> pyarrow.DataType | None:
        """A parquet column's type. In other files every value is a string, or is written as JSON."""
        if self.kind != "parquet":
            return None
        import pyarrow

        found = _parquet(self.path).schema_arrow.field(column).type
        return found.value_type if pyarrow.types.is_dictionary(found) else found

    def read(self, columns: Columns, after: int = 0) -> Iterator[Row | BadRow]:
        """The rows after line `after`, in order."""
        readers: dict[Kind, Callable[[], Iterator[tuple[int, Any]]]] = {
            "jsonl": lambda: _json_lines(self, after),
            "csv": lambda: _tables(self, after),
            "tsv": lambda: _tables(self, after),
            "parquet": lambda: _parquet_rows(self.path, columns, after),
            "lines": lambda: _plain_lines(self, columns.text, after),
            "files": lambda: _texts(self, columns.text, after),
        }
        keeps_types = self.kind == "parquet"
        with _readable(self.path):
            for line, found in readers[self.kind]():
                yield BadRow(line, found) if isinstance(found, str) else row_of(line, found, columns, keeps_types)


def find_inputs(paths: Iterable[Path], kind: Kind | None = None) -> list[Input]:
    """The inputs at the paths, in their order. A folder stands for all files in it and below, by name.

    Raises:
        InputError: for a path that does not exist, or a file whose kind is not known.
    """
    found = [one for path in paths for one in (_inputs_in(path, kind) if path.is_dir() else [_input_at(path, kind)])]
    path, times = Counter(one.path.resolve() for one in found).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} is given twice")
    return found


def _inputs_in(folder: Path, kind: Kind | None) -> list[Input]:
    files = _files_in(folder)
    if not files:
        raise InputError(f"{folder} holds no files")
    if kind == "files":
        return [Input(folder, "files")]
    inputs = [_input_at(path, kind) for path in files]
    plain = [one for one in inputs if one.kind == "lines"]
    if kind or not plain:
        return inputs
    if len(plain) < len(inputs):
        other = next(one for one in inputs if one.kind != "lines")
        raise InputError(
            f"{folder} holds texts, such as {plain[0].path.name}, and tables, such as {other.path.name}: name the "
            "files to embed, or give --input-format"
        )
    return [Input(folder, "files")]


def _files_in(folder: Path) -> list[Path]:
    """The files in and below a folder that are not hidden and not in a hidden folder.

    Raises:
        InputError: for a folder that can't be listed, and for a link to a folder or to nothing: its files would be
            left out without a word.
    """
    seen: list[Path] = []
    for below, folders, names in os.walk(folder, onerror=_refuse_unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(below, name))]
        files = [Path(below, name) for name in (*links, *names) if not name.startswith(".")]
        if other := next((path for path in files if not path.is_file()), None):
            raise InputError(f"{other} is no file, and links to folders are not followed: name its files, or remove it")
        seen += files
    return sorted(seen, key=lambda path: path.relative_to(folder).parts)


def _refuse_unlisted(error: OSError) -> None:
    raise InputError(f"{error.filename} can't be listed: {error.strerror}") from error


def _input_at(path: Path, kind: Kind | None) -> Input:
    if not path.is_file():
        raise InputError(f"{path} is not there")
    by_name = _KIND_OF_SUFFIX.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if kind is None and (by_name is None or (by_name == "parquet" and path.suffix == ".gz")):
        known = ", ".join(_KIND_OF_SUFFIX)
        raise InputError(f"{path}: its name does not say what it is ({known}): give --input-format")
    return Input(path, kind or cast(Kind, by_name))


def row_of(line: int, found: Mapping[str, Any], columns: Columns, keeps_types: bool = True) -> Row | BadRow:
    """Make a row from values by column. Values that are no strings become JSON, unless `keeps_types`."""
    text = found.get(columns.text)
    if not isinstance(text, str):
        return BadRow(line, _no_text(found, columns.text))
    values = [found.get(name) for name in columns.beside]
    if columns.id and values[0] is None:
        return BadRow(line, f"there is no {columns.id!r}" + (", it is null" if columns.id in found else ""))
    if not keeps_types:
        values = [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
    for name, value in zip((columns.text, *columns.beside), (text, *values), strict=True):
        if isinstance(value, str) and (problem := unicode_problem(value)):
            return BadRow(line, f"{name!r} {problem}")
    return Row(line, text, tuple(values), tuple(name for name in columns.carried if name not in found))


def _no_text(found: Mapping[str, Any], column: str) -> str:
    if column not in found:
        return f"there is no {column!r}, only {', '.join(map(repr, found)) or 'nothing'}"
    value = found[column]
    return f"{column!r} is {'null' if value is None else f'{type(value).__name__} ({value!r:.40})'}, not a string"


# Each of these readers gives (line, values by column) or (line, the error as a string).


def _plain_lines(one: Input, column: str, after: int) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    for number, text in numbered_lines(one.path, one.most_bytes):
        if number > after:
            yield number, text if isinstance(text, BadText) else {column: text}


def _json_lines(one: Input, after: int) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    lines = numbered_lines(one.path, one.most_bytes)
    for number, item in json_values((number, line) for number, line in lines if number > after):
        yield number, item if isinstance(item, dict | BadText) else "is not a JSON object"


def _tables(one: Input, after: int) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    with open_text(one.path) as file:
        cells = _cells(one, file)
        _, header = next(cells, (0, []))
        for line, row in cells:
            if line <= after or not row:
                continue
            if len(row) != len(header):
                yield line, f"has {len(row)} columns, the header {len(header)}"
            else:
                yield line, dict(zip(header, row, strict=True))


def _parquet_rows(path: Path, columns: Columns, after: int) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    file = _parquet(path)
    groups, skipped = list(range(file.num_row_groups)), 0
    while groups and skipped + (rows := file.metadata.row_group(groups[0]).num_rows) <= after:
        skipped += rows
        groups.pop(0)
    names = list(dict.fromkeys((columns.text, *columns.beside)))
    number = skipped
    for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=names):
        arrays = [batch.column(name) for name in names]
        for place in range(batch.num_rows):
            number += 1
            if number > after:
                try:
                    yield number, {name: array[place].as_py() for name, array in zip(names, arrays, strict=True)}
                except UnicodeDecodeError as error:
                    yield number, f"is not valid UTF-8: {error.reason}"


def _texts(one: Input, column: str, after: int) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    for number, path in enumerate(one.files(), 1):
        if number <= after:
            continue
        with _readable(path):
            text = read_text(path, one.most_bytes)
        name = path.relative_to(one.path).as_posix() if path != one.path else path.name
        yield number, text if isinstance(text, BadText) else {PATH_COLUMN: name, column: text}


def _cells(one: Input, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(line of the row's end, cells) of each row, including the header. Tab-separated files have no quoting.

    Raises:
        InputError: for a quote that is never closed, or that is closed within a field. Which rows lie behind it can't
            be told, so none of them is guessed.
    """
    csv.field_size_limit(one.most_bytes)
    table: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if one.kind == "tsv" else {"strict": True}
    reader = csv.reader(file, **table)
    ended = 0
    try:
        for row in reader:
            yield reader.line_num, row
            ended = reader.line_num
    except csv.Error as error:
        where = f"{one.path}, line {ended + 1}"
        if one.kind == "tsv":
            raise InputError(f"{where}: {error}") from error
        raise InputError(
            f"{where}: a quote in the row that begins here is never closed, or ends before its field does ({error}): "
            "write a quote within a quoted field twice"
        ) from error


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'llm2vec-service[bulk]'") from error
    # Without a buffer size, a whole row group's columns are read at once.
    return ParquetFile(path, buffer_size=_PARQUET_BUFFER)


def _readable(path: Path) -> AbstractContextManager[None]:
    return readable(path, InputError, ValueError)  # pyarrow's errors are kinds of it
