"""What a job's folder holds, as its users read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from safetensors.numpy import load_file


class Output(NamedTuple):
    """All shards, one behind the other."""

    rows: list[int]
    columns: dict[str, list[Any]]
    vectors: NDArray[Any]
    errors: list[dict[str, Any]]


def read_output(folder: Path) -> Output:
    """Everything in the folder, and nothing that its manifest does not name."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [shard["file"] for shard in manifest["shards"]]
    beside = {Path(name).with_suffix(".jsonl").name for name in names if name.endswith(".safetensors")}
    found = {path.name for path in folder.iterdir()} - {"manifest.json", "errors.jsonl"} - beside
    assert found == set(names), "the folder holds what the manifest does not name"
    read = _read_parquet if manifest["job"]["file_format"] == "parquet" else _read_tensors
    parts = [read(folder / name) for name in names]
    errors = folder / "errors.jsonl"
    return Output(
        [row for part in parts for row in part[0]],
        {name: [value for part in parts for value in part[1][name]] for name in (parts[0][1] if parts else ())},
        np.concatenate([part[2] for part in parts]) if parts else np.empty((0, 0)),
        [json.loads(line) for line in errors.read_text().splitlines()] if errors.exists() else [],
    )


def _read_parquet(path: Path) -> tuple[list[int], dict[str, list[Any]], NDArray[Any]]:
    table = pyarrow.parquet.read_table(path)
    vectors = table["embedding"].combine_chunks()
    matrix = vectors.values.to_numpy(zero_copy_only=False).reshape(table.num_rows, vectors.type.list_size)
    columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("row", "embedding")}
    return table["row"].to_pylist(), columns, matrix


def _read_tensors(path: Path) -> tuple[list[int], dict[str, list[Any]], NDArray[Any]]:
    tensors = load_file(path)
    beside = path.with_suffix(".jsonl")
    items = [json.loads(line) for line in beside.read_text().splitlines()] if beside.exists() else []
    assert not items or [item["row"] for item in items] == tensors["row"].tolist()
    columns = {name: [item[name] for item in items] for name in (items[0] if items else ()) if name != "row"}
    return tensors["row"].tolist(), columns, tensors["embedding"]
