"""One shard as a file: a parquet table; or tensors, with JSON lines beside them if there are other columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.bulk.job import ID_COLUMN, ROW_COLUMN, VECTOR_COLUMN, FileFormat, Job, JobError
from service.bulk.reading import Input, InputError

if TYPE_CHECKING:
    import pyarrow

# B rows, D numbers of a stored vector

# Writes one file of the shard. Arguments: its suffix, and the function that fills a path.
Write = Callable[[str, Callable[[Path], object]], None]

# The JSON lines beside tensors.
BESIDE_SUFFIX = ".jsonl"


@dataclass
class ShardRows:
    """The rows of a shard, as they come: the numbers of those with a vector, and their other columns and vectors.

    Rows are numbered over all inputs, from 0. So far, `read` rows were read from `first_row` on, the last of which is
    `line` of input number `input`. `errors` lists those without a vector.
    """

    first_row: int
    numbers: list[int] = field(default_factory=list)
    values: list[tuple[Any, ...]] = field(default_factory=list)
    vectors: list[NDArray[Any]] = field(default_factory=list)  # each (B, D), in the stored dtype
    errors: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    tokens: int = 0
    input: int = 0
    line: int = 0


class ShardWriter:
    """Writes the shards of one job, all with the same columns of the same types."""

    def __init__(self, job: Job, inputs: Sequence[Input]) -> None:
        """Raises InputError if two inputs have different types in a carried column."""
        self._job = job
        self._columns = (*([ID_COLUMN] if job.id_column else []), *job.carried)
        if job.file_format == "parquet":
            self._types = _types(job, inputs)

    def save(self, rows: ShardRows, write: Write) -> None:
        """Write a shard's files; the file that the manifest names comes last."""
        about = {"llm2vec-service": self._job.model_dump_json(exclude={"inputs"})}
        if self._job.file_format == "parquet":
            write(".parquet", lambda path: self._save_parquet(rows, about, path))
            return
        if self._columns:
            write(BESIDE_SUFFIX, lambda path: self._save_beside(rows, path))
        write(".safetensors", lambda path: _save_tensors(rows, about, path))

    def _save_parquet(self, rows: ShardRows, about: Mapping[str, str], path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        arrays: dict[str, pyarrow.Array] = {ROW_COLUMN: pyarrow.array(rows.numbers, pyarrow.int64())}
        for place, name in enumerate(self._columns):
            arrays[name] = pyarrow.array([values[place] for values in rows.values], self._types[name])
        arrays[VECTOR_COLUMN] = as_lists(np.concatenate(rows.vectors))
        table = pyarrow.table(arrays).replace_schema_metadata(about)
        # The numbers in vectors are nearly random: compressing them takes time and saves nothing.
        others = [name for name in arrays if name != VECTOR_COLUMN]
        parquet.write_table(
            table,
            path,
            compression={**dict.fromkeys(others, "zstd"), f"{VECTOR_COLUMN}.list.element": "none"},
            use_dictionary=others,
            write_statistics=others,
        )

    def _save_beside(self, rows: ShardRows, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for number, values in zip(rows.numbers, rows.values, strict=True):
                item = {ROW_COLUMN: number, **dict(zip(self._columns, values, strict=True))}
                file.write(json.dumps(item, ensure_ascii=False, default=str) + "\n")


def check_format(file_format: FileFormat) -> None:
    """Refuse a format whose package is not installed.

    Raises:
        JobError: naming the package.
    """
    if file_format == "safetensors":
        return
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise JobError(
            "parquet needs pyarrow: pip install 'llm2vec-service[bulk]', or give --format safetensors"
        ) from error


def as_lists(vectors: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> pyarrow.FixedSizeListArray:
    """(B, D) vectors as a column of lists, null where they are missing."""
    import pyarrow

    mask = None if missing is None else pyarrow.array(missing)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1], mask=mask)


def _save_tensors(rows: ShardRows, about: dict[str, str], path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {ROW_COLUMN: np.array(rows.numbers, np.int64), VECTOR_COLUMN: np.concatenate(rows.vectors)}
    save_file(tensors, path, about)


def _types(job: Job, inputs: Sequence[Input]) -> dict[str, pyarrow.DataType]:
    import pyarrow

    types: dict[str, pyarrow.DataType] = {}
    for source, name in ((job.id_column, ID_COLUMN), *((name, name) for name in job.carried)):
        if source is None:
            continue
        found = {one.path: one.type_of(source) or pyarrow.string() for one in inputs}
        first, kind = next(iter(found.items()))
        if other := next((path for path, other in found.items() if other != kind), None):
            raise InputError(
                f"the column {source!r} is {kind} in {first} and {found[other]} in {other}: make them the same, or "
                "embed these files into outputs of their own"
            )
        types[name] = kind
    return types
