"""How far something is, on stderr: a bar on a terminal, and lines where there is none, as in a container's log.

tqdm draws a bar over the last one by a carriage return; what collects a log waits for the end of the line.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from tqdm.auto import tqdm

LINE_SECONDS = 10.0


class Lines(tqdm):  # type: ignore[type-arg]  # it takes none when it runs
    """tqdm's bar as whole lines: one at the beginning, one at the end, and every `LINE_SECONDS` one between them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._next_line = 0.0
        # What tqdm itself writes around its bar goes nowhere.
        super().__init__(*args, **{**options, "file": io.StringIO(), "ascii": True})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm to draw the bar."""
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Called by tqdm, more than once."""
        if not self.disable:
            self._next_line = 0.0
            self.display()
        super().close()


def bar_class() -> type[tqdm[Any]]:
    """tqdm, or `Lines` where stderr is no terminal."""
    return tqdm if sys.stderr.isatty() else Lines
