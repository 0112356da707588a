"""The description of a job, as its manifest stores it. A run goes on only from an earlier run of the same job.

It knows the options and the work done; it knows nothing of how vectors are made or files are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from model_store.errors import UserError
from model_store.manifest import file_sha256
from service.bulk.asked import FileFormat, OnError
from service.bulk.reading import PATH_COLUMN, BadRow, Columns, Input, InputError, Kind
from service.embedding.choices import EmbedDtype, Overflow

FORMAT = 1

# The output's own columns.
ROW_COLUMN = "row"
ID_COLUMN = "id"
VECTOR_COLUMN = "embedding"


class JobError(UserError):
    """A job that can't begin or go on with these options; the message names the way out."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputRecord(_Frozen):
    """A file, or a folder of texts, as it was when the job began. `state` changes whenever it is written to."""

    path: str
    kind: Kind
    bytes: int
    state: str
    sha256: str
    rows: int


class VectorSource(_Frozen):
    """The source of the vectors: everything that changes them or decides which texts get one. "" means not known."""

    model: str
    embedding_space: str
    width: int
    max_input_tokens: int
    dtype: str = ""
    truncation: str = ""
    empty_text: str = ""


class Job(_Frozen):
    """Everything that the output depends on."""

    source: VectorSource
    instruction: str
    dimensions: int
    overflow: Overflow
    embed_dtype: EmbedDtype
    text_column: str
    id_column: str | None
    carried: tuple[str, ...]
    file_format: FileFormat
    rows_per_shard: int
    inputs: tuple[InputRecord, ...]

    @property
    def columns(self) -> Columns:
        """The columns that are read of each row."""
        return Columns(self.text_column, self.id_column, self.carried)

    @property
    def rows(self) -> int:
        """The number of rows of all inputs, including bad rows."""
        return sum(one.rows for one in self.inputs)

    def differences(self, other: Job) -> list[str]:
        """The differences between two jobs, in words. An input that only moved is no difference."""
        own, others = self.model_dump(), other.model_dump()
        parts: dict[str, tuple[Any, Any]] = {
            **{name: (own[name], others[name]) for name in own if name not in ("source", "inputs")},
            **{name: (own["source"][name], others["source"][name]) for name in own["source"]},
        }
        found = [f"{name} {then!r}, not {now!r}" for name, (then, now) in parts.items() if then != now]
        if len(self.inputs) != len(other.inputs):
            found.append(f"{len(self.inputs)} inputs, not {len(other.inputs)}")
        else:
            found += [
                f"another {now.path}"
                for then, now in zip(self.inputs, other.inputs, strict=True)
                if (then.kind, then.sha256) != (now.kind, now.sha256)
            ]
        return found


class Shard(_Frozen):
    """One file of the output: its `rows`, and the `read` rows of the inputs that it stands for, including bad rows.

    Its last row is `line` of input number `input`.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    first_row: int
    read: int
    tokens: int
    input: int
    line: int


class Manifest(_Frozen):
    """`manifest.json`: the job, and the work done. The first `errors_bytes` of the list of errors count."""

    format: int = FORMAT
    job: Job
    shards: tuple[Shard, ...] = ()
    errors: int = 0
    errors_bytes: int = 0
    complete: bool = False

    @property
    def rows(self) -> int:
        """The number of rows of the output."""
        return sum(shard.rows for shard in self.shards)

    @property
    def read(self) -> int:
        """The number of rows of the inputs that are done."""
        return sum(shard.read for shard in self.shards)


def describe(
    inputs: Sequence[Input], columns: Columns, on_error: OnError, known: Iterable[InputRecord] = ()
) -> tuple[InputRecord, ...]:
    """Describe the inputs. Each is read once to its end, unless it is `known` and was not written to since.

    Raises:
        InputError: for an input that can't be read or lacks a column, and for the first bad row with on_error "stop".
    """
    check_columns(columns)
    by_path: Mapping[tuple[str, str], InputRecord] = {(record.path, record.kind): record for record in known}
    return tuple(_describe(one, columns, on_error, by_path.get((_name_of(one), one.kind))) for one in inputs)


def check_columns(columns: Columns) -> None:
    """Refuse columns whose name would be in the output twice.

    Raises:
        InputError: naming the column.
    """
    for name in columns.carried:
        if name in (ROW_COLUMN, ID_COLUMN, VECTOR_COLUMN):
            raise InputError(f"the output has a column {name!r} of its own: the input's can't be carried into it")
        if columns.carried.count(name) > 1:
            raise InputError(f"the column {name!r} is to be carried twice")


def state_of(one: Input) -> str:
    """A string of sizes and times of last change. It stays the same as long as nobody writes to the input."""
    if not one.path.is_dir():
        return _stamp(one.path)
    digest = hashlib.sha256()
    for path in one.files():
        digest.update(f"{path.relative_to(one.path)}\0{_stamp(path)}\n".encode())
    return digest.hexdigest()


def _describe(one: Input, columns: Columns, on_error: OnError, known: InputRecord | None) -> InputRecord:
    state = state_of(one)
    if known and known.state == state:
        return known
    return InputRecord(
        path=_name_of(one),
        kind=one.kind,
        bytes=sum(path.stat().st_size for path in one.files()),
        state=state,
        sha256=_content_sha256(one),
        rows=_count(one, columns, on_error),
    )


def _name_of(one: Input) -> str:
    """The input's path, as valid Unicode."""
    return str(one.path.resolve()).encode(errors="backslashreplace").decode()


def _stamp(path: Path) -> str:
    about = path.stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _content_sha256(one: Input) -> str:
    if not one.path.is_dir():
        return file_sha256(one.path)
    digest = hashlib.sha256()
    for path in one.files():
        digest.update(f"{path.relative_to(one.path)}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _count(one: Input, columns: Columns, on_error: OnError) -> int:
    """Check that the input has the columns asked for, and count its rows."""
    names = one.names(columns)
    for name in () if names is None else (columns.text, *columns.beside):
        assert names is not None
        if (times := names.count(name)) != 1:
            has = f"has {times} columns" if times else "has no column"
            raise InputError(f"{one.path} {has} {name!r}, only {', '.join(map(repr, names)) or 'nothing'}")
    rows = 0
    never = set(columns.carried)
    for row in one.read(columns):
        rows += 1
        if isinstance(row, BadRow):
            if on_error == "stop":
                raise bad_row(one, row)
        elif never:
            never.intersection_update(row.missing)
    if rows and never:
        raise InputError(f"no row of {one.path} has a column {min(never)!r}")
    return rows


def bad_row(one: Input, row: BadRow) -> InputError:
    """The error of a job that stops at a bad row."""
    return InputError(
        f"{one.where(row.line)}: {row.reason.rstrip('.')}. Mend it, or give --on-error skip, which leaves such rows "
        "out and lists them"
    )


def default_id(inputs: Sequence[Input]) -> str | None:
    """The default id column: the path, if every text is a file of its own."""
    return PATH_COLUMN if all(one.kind == "files" for one in inputs) else None
