"""A job that is killed before each of its changes to the folder in turn: python -m tests.service.bulk.killed FOLDER

Python tells audit hooks of every file that is opened, renamed, cut or removed, which is where the kill comes. The job
is then done to its end, by a second run that is killed a little later in every other case, and a third. Prints how
many places there were. The processes are forks of this one, which has no threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from service.bulk.reading import Columns, Input
from tests.service.bulk.fakes import REFUSED, FakeVectors, do_job

ROWS = 21
_EVENTS = frozenset({"open", "os.rename", "os.truncate", "os.remove", "os.mkdir"})


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
    child = os.fork()
    if not child:
        if point is not None:
            _kill_at(point, str(out))
        try:
            do_job(
                [Input(path, "jsonl")],
                out,
                FakeVectors(),
                Columns("text", None, ("n",)),
                on_error="skip",
                file_format="safetensors",
            )
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _kill_at(point: int, out: str) -> None:
    left = point

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _EVENTS and str(arguments[0]).startswith(out):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
