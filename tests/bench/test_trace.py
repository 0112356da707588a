"""The picture of the server's threads, drawn from the notes of an earlier run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

NOTES = [
    ("tokenizer_0", 0.125, 0.25, 0.03125, 0),
    ("event loop", 0.0, 0.001, 0.001, 0),
    ("event loop", 0.1, 0.125, 0.0, 0),
    ("device_0", 0.0, 0.25, 0.2, 32),
    ("device_0", 0.25, 0.498, 0.2, 7001),
    ("device_0", 0.498, 0.5, 0.002, 7002),
]


def test_rows_and_batches_of_a_trace(tmp_path: Path) -> None:
    load = {"model": "m", "seconds": 0.5, "clients": 4, "queries": 9, "p50_ms": 20.4, "bulk_inputs": 64, "bulk_at": 0.1}
    notes, picture = tmp_path / "notes.json", tmp_path / "folder" / "trace.svg"
    notes.write_text(json.dumps({**load, "notes": NOTES}))
    command = [sys.executable, "-m", "bench.trace", "--notes", str(notes), "--out", str(picture)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.items() >= {"benchmark": "trace", **load}.items()
    assert found["rows"] == {
        "device_0": {"busy": 1.0, "on_a_core": 0.804, "pieces": 3, "longest_ms": 250.0},
        "event loop": {"busy": 0.052, "on_a_core": 0.002, "pieces": 2, "longest_ms": 25.0},
        "tokenizer_0": {"busy": 0.25, "on_a_core": 0.062, "pieces": 1, "longest_ms": 125.0},
    }
    texts = re.findall("<!-- (.*?) -->", picture.read_text())  # matplotlib's copies of the texts that it draws
    labels = [texts.index(label) for label in ("device_0", "event loop", "tokenizer_0")]
    assert labels == sorted(labels)
    assert {"100 % busy, 80 % on a core", "5 % busy, 0 % on a core", "25 % busy, 6 % on a core"} < set(texts)
    assert {"32", "7001"} < set(texts)
    assert "7002" not in texts, "the number is wider than its batch"
