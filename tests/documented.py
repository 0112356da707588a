"""The commands of docs/capacity.md with what they print: runs them again and writes that down.

    python -m tests.documented

A block that begins with `$ llm2vec-service` is one command, over several lines where these end with a backslash, and
what it prints.
"""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from service.cli import main as command

PAGE = Path(__file__).parents[1] / "docs" / "capacity.md"

_BLOCK = re.compile(r"```text\n\$ llm2vec-service ((?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", re.DOTALL)


def main() -> None:
    """Bring the page up to date."""
    PAGE.write_text(run_again(PAGE.read_text()))


def run_again(page: str) -> str:
    """The page with what its commands print now."""
    return _BLOCK.sub(lambda block: f"```text\n$ llm2vec-service {block[1]}\n{output(block[1])}```", page)


def output(arguments: str) -> str:
    """What the command prints.

    Raises:
        RuntimeError: if it fails.
    """
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = command(shlex.split(arguments.replace("\\\n", " ")))
    if status:
        raise RuntimeError(f"llm2vec-service {arguments} ended with {status}")
    return printed.getvalue()


if __name__ == "__main__":
    main()
