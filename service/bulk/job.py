"""The command's options, and the job that they describe, as its manifest stores it.

A run goes on only from an earlier run of the same job. This module knows nothing of how vectors are made or files are
written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from model_store.errors import UserError
from model_store.manifest import file_sha256
from service.bulk.reading import BadRow, Columns, Input, InputError, Kind
from service.embedding.choices import EmbedDtype, Overflow

FileFormat = Literal["parquet", "safetensors"]
OnError = Literal["stop", "skip"]

# The output's own columns.
ROW_COLUMN = "row"
ID_COLUMN = "id"
VECTOR_COLUMN = "embedding"


class JobError(UserError):
    """A job that can't begin or go on with these options; the message names the way out."""


@dataclass(frozen=True)
class Asked:
    """The command's options; see `llm2vec-service embed --help`. For None, the settings decide."""

    inputs: Sequence[Path]
    out: Path
    url: str | None = None
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    input_format: Kind | None = None
    text_column: str = "text"
    id_column: str | None = None
    carry: Sequence[str] = ()
    instruction: str | None = None
    input_type: str | None = None
    dimensions: int | None = None
    overflow: Overflow = "error"
    embed_dtype: EmbedDtype = "float32"
    format: FileFormat = "parquet"
    rows_per_shard: int = 10_000
    on_error: OnError = "stop"
    overwrite: bool = False
    concurrency: int = 16


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
    """The source of the vectors: everything that changes them or decides which texts get one. "" means not known.

    `widths`, which the vectors may be cut to, change none and are not stored.
    """

    model: str
    embedding_space: str
    width: int
    max_input_tokens: int
    dtype: str = ""
    truncation: str = ""
    empty_text: str = ""
    widths: tuple[int, ...] = Field((), exclude=True)


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
        return Columns(self.text_column, self.id_column, self.carried)

    @property
    def rows(self) -> int:
        """The number of rows of all inputs, including bad rows."""
        return sum(one.rows for one in self.inputs)

    def differences(self, other: Job) -> list[str]:
        """The differences between two jobs, in words. An input that only moved is no difference."""
        own, others = (job.model_dump(exclude={"source", "inputs"}) | job.source.model_dump() for job in (self, other))
        found = [f"{name} {then!r}, not {others[name]!r}" for name, then in own.items() if then != others[name]]
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

    format: int = 1
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
    for name in columns.carried:
        if name in (ROW_COLUMN, ID_COLUMN, VECTOR_COLUMN):
            raise InputError(f"the output has a column {name!r} of its own: the input's can't be carried into it")
        if columns.carried.count(name) > 1:
            raise InputError(f"the column {name!r} is to be carried twice")
    by_path = {(record.path, record.kind): record for record in known}
    records = []
    for one in inputs:
        name = str(one.path.resolve()).encode(errors="backslashreplace").decode()  # valid Unicode
        state = state_of(one)
        record = by_path.get((name, one.kind))
        if record is None or record.state != state:
            record = InputRecord(
                path=name,
                kind=one.kind,
                bytes=sum(path.stat().st_size for path in one.files()),
                state=state,
                sha256=_over_files(one, file_sha256),
                rows=_count(one, columns, on_error),
            )
        records.append(record)
    return tuple(records)


def state_of(one: Input) -> str:
    """A string of sizes and times of last change. It stays the same as long as nobody writes to the input."""
    return _over_files(one, _stamp)


def _stamp(path: Path) -> str:
    about = path.stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _over_files(one: Input, property_of: Callable[[Path], str]) -> str:
    """A property of the input's file; for a folder, a hash of the names and this property of all its files."""
    if not one.path.is_dir():
        return property_of(one.path)
    digest = hashlib.sha256()
    for path in one.files():
        digest.update(f"{path.relative_to(one.path)}\0{property_of(path)}\n".encode())
    return digest.hexdigest()


def _count(one: Input, columns: Columns, on_error: OnError) -> int:
    """Check that the input has the columns asked for, and count its rows."""
    if (names := one.names(columns)) is not None:
        for name in (columns.text, *columns.beside):
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
    return InputError(
        f"{one.where(row.line)}: {row.reason.rstrip('.')}. Mend it, or give --on-error skip, which leaves such rows "
        "out and lists them"
    )
