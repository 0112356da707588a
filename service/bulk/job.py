"""What one job is, as its manifest says it: two runs of the same go on from each other, others are refused.

Knows what is asked for and what has been done; nothing of how vectors come about or how files are written.
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
    """A job that can't be begun or gone on with as asked for; the message names the way out."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputRecord(_Frozen):
    """A file, or a folder of texts, as it was when the job began: `state` changes whenever it is written."""

    path: str
    kind: Kind
    bytes: int
    state: str
    sha256: str
    rows: int


class VectorSource(_Frozen):
    """What makes the vectors, as far as it moves them or decides which texts get one. "" is not known."""

    model: str
    embedding_space: str
    width: int
    max_input_tokens: int
    dtype: str = ""
    truncation: str = ""
    empty_text: str = ""


class Job(_Frozen):
    """All that the output depends on."""

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
        """What is read of each row."""
        return Columns(self.text_column, self.id_column, self.carried)

    @property
    def rows(self) -> int:
        """Rows of all inputs, bad ones included."""
        return sum(one.rows for one in self.inputs)

    def differences(self, other: Job) -> list[str]:
        """What is not the same, in words. An input that only moved is the same."""
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
    """One file of the output: its own rows, and which of the inputs' it stands for, bad ones included.

    It ends with `line` of input number `input`.
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
    """`manifest.json`: the job, and what of it is done. Of the list of errors `errors_bytes` count."""

    format: int = FORMAT
    job: Job
    shards: tuple[Shard, ...] = ()
    errors: int = 0
    errors_bytes: int = 0
    complete: bool = False

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return sum(shard.rows for shard in self.shards)

    @property
    def read(self) -> int:
        """Rows of the inputs that are done."""
        return sum(shard.read for shard in self.shards)


def describe(
    inputs: Sequence[Input], columns: Columns, on_error: OnError, known: Iterable[InputRecord] = ()
) -> tuple[InputRecord, ...]:
    """What the inputs are, each read once to its end, unless it is `known` and has not been written since.

    Raises:
        InputError: for one that can't be read or lacks a column; and for the first bad row, if that is to stop the job.
    """
    check_columns(columns)
    by_path: Mapping[tuple[str, str], InputRecord] = {(record.path, record.kind): record for record in known}
    return tuple(_describe(one, columns, on_error, by_path.get((_name_of(one), one.kind))) for one in inputs)


def check_columns(columns: Columns) -> None:
    """Refuse what would be in a column twice.

    Raises:
        InputError: naming it.
    """
    for name in columns.carried:
        if name in (ROW_COLUMN, ID_COLUMN, VECTOR_COLUMN):
            raise InputError(f"the output has a column {name!r} of its own: the input's can't be carried into it")
        if columns.carried.count(name) > 1:
            raise InputError(f"the column {name!r} is to be carried twice")


def state_of(one: Input) -> str:
    """Sizes and times of last change: the same as long as nobody has written to it."""
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
    """Its path, as it can be written down."""
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
    """Its rows, once it is known to have what is asked for."""
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
    """What a job that stops at such a row says."""
    return InputError(
        f"{one.where(row.line)}: {row.reason.rstrip('.')}. Mend it, or give --on-error skip, which leaves such rows "
        "out and lists them"
    )


def default_id(inputs: Sequence[Input]) -> str | None:
    """The column that tells rows apart where none is named: the path of texts that are a file each."""
    return PATH_COLUMN if all(one.kind == "files" for one in inputs) else None
