"""A job killed before each of its changes to files: python -m tests.model_store.training.killed_mining FOLDER

Python tells audit hooks of every file that is opened, renamed, cut or removed, which is where the kill comes. The job
is then done to its end. Prints how many places there were, and how many outputs. The processes are forks of this one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from model_store.training.mining import Blocks, Miner, Pool
from model_store.training.negatives import Rules
from model_store.training.texts import read_contrastive
from tests.model_store.training.mined import vectors_of

_EVENTS = frozenset({"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"})


def main() -> None:
    """Do the job again and again, until it comes to its end unharmed."""
    folder = Path(sys.argv[1])
    point, outputs = 0, set()
    while _dies(folder, out := folder / f"{point}.jsonl", point):
        if not out.exists():
            assert not _dies(folder, out, None)
        outputs.add(out.read_bytes())
        point += 1
    outputs.add(out.read_bytes())
    print(point, len(outputs))


def _dies(folder: Path, out: Path, point: int | None) -> bool:
    """Whether a run was killed, before its change number `point`, or came to its end."""
    child = os.fork()
    if not child:
        if point is not None:
            _kill_at(point, out.stem)
        try:
            pool = Pool.of(read_contrastive(folder / "pairs.jsonl"), [])
            rules = Rules(sampling_strategy="random", range_max=8, relative_margin=0.1)
            miner = Miner(vectors_of, "fake", rules, torch.device("cpu"), True, Blocks(7, 5, 4))
            miner.mine(pool, out)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _kill_at(point: int, name: str) -> None:
    left = point

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _EVENTS and f"{name}.jsonl" in str(arguments[0]):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
