"""A job that is killed before each of its changes to the folder in turn: python -m tests.service.bulk.killed FOLDER

The job is then done to its end, by a second run that is killed a little later in every other case, and a third. Prints
how many places there were. The processes are forks of this one, which has no threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from service.bulk.reading import Columns, Input
from tests.kills import dies
from tests.service.bulk.fakes import REFUSED, FakeVectors, do_job

ROWS = 21


def main() -> None:
    """Do the job again and again, until it comes to its end unharmed."""
    folder = Path(sys.argv[1])
    path = folder / "a.jsonl"
    texts = [REFUSED if number in (4, 15, 16) else f"text {number}" for number in range(ROWS)]
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    point = 0
    while _dies(path, folder / f"out-{point}", point):
        if point % 2:
            _dies(path, folder / f"out-{point}", point // 2 + 3)
        assert not _dies(path, folder / f"out-{point}", None)
        point += 1
    print(point)


def _dies(path: Path, out: Path, point: int | None) -> bool:
    """Whether a run was killed, before its change number `point`, or came to its end."""

    def embed() -> None:
        inputs, columns = [Input(path, "jsonl")], Columns("text", None, ("n",))
        do_job(inputs, out, FakeVectors(), columns, on_error="skip", file_format="safetensors")

    return dies(embed, lambda changed: changed.startswith(str(out)), point)


if __name__ == "__main__":
    main()
