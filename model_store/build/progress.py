"""Progress on stderr: a bar on a terminal, and whole lines elsewhere, as in a container's log.

tqdm ends its bar with a carriage return, to draw over it; but a collector of logs waits for the end of a line.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from tqdm.auto import tqdm

LINE_SECONDS = 10.0


class Lines(tqdm):  # type: ignore[type-arg]  # tqdm takes no type arguments at run time
    """tqdm's bar as whole lines: one at the beginning, one every `LINE_SECONDS`, and one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._next_line = 0.0
        # tqdm writes into a buffer that nobody reads; `display` prints the lines.
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
    """tqdm, or `Lines` if stderr is no terminal."""
    return tqdm if sys.stderr.isatty() else Lines


class ProgressBar:
    """Shows the bytes of weights written."""

    _bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = bar_class()(total=total, desc="building", unit="B", unit_scale=True)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None
