"""Data for mining: pairs, and vectors that depend on a text, its instruction and its role alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import Role
from tests.model_store.training.runs import texts

WIDTH = 6


def vectors_of(some: Sequence[str], instruction: str | None, role: Role | None) -> NDArray[np.float32]:
    """(n, WIDTH) random directions."""
    found = np.empty((len(some), WIDTH), np.float32)
    for row, text in zip(found, some, strict=True):
        seed = int.from_bytes(sha256(f"{text}|{instruction}|{role}".encode()).digest()[:8], "big")
        row[:] = np.random.default_rng(seed).normal(size=WIDTH)
    unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def write_pairs(path: Path, count: int = 24, **more: Any) -> Path:
    """A file of pairs; each fifth query is on a second line with another positive."""
    queries, positives = texts(count), texts(count, 3)
    rows = [
        {"query": f"{q} {n}", "positive": f"{p} {n}", **more}
        for n, (q, p) in enumerate(zip(queries, positives, strict=True))
    ]
    rows += [{**row, "positive": f"also {row['positive']}"} for row in rows[::5]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
