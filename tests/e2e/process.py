"""A server as its users run it: a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


class ServerProcess:
    """`llm2vec-service serve` on a free port, from start to exit status; its layers not compiled unless asked for.

    Of its log it remembers the lines that `keeps` says.
    """

    def __init__(
        self,
        model: Path | str,
        environment: dict[str, str] | None = None,
        *options: str,
        module: str = "service",
        keeps: Callable[[str], bool] = lambda line: True,
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LLM2VEC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", "--model", str(model), "--port", "0", *options],
            env={**clean, "LLM2VEC_COMPILE": "off", **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._keeps = keeps
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        try:
            self.base_url = f"http://127.0.0.1:{self.wait_for('listening')['port']}"
            self.wait_for("ready")
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def wait_for(self, message: str, seconds: float = 300.0) -> dict[str, Any]:
        """The first log line with this message."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for record in self.records():
                if record["message"] == message:
                    return record
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {message!r} in the log:\n" + "\n".join(self.lines))

    def records(self) -> list[dict[str, Any]]:
        """The log lines so far."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def stop(self, with_signal: signal.Signals = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Send a signal where it still runs; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        status = self.process.wait(seconds)
        self._reader.join(5)
        if self.process.stderr:
            self.process.stderr.close()
        return status

    def embed(self, texts: list[str] | str, client: httpx.Client | None = None, **fields: Any) -> httpx.Response:
        """`POST /v1/embeddings`."""
        post = client.post if client else httpx.post
        return post(f"{self.base_url}/v1/embeddings", json={"input": texts, **fields}, timeout=120)

    def metric(self, line: str) -> float:
        """One series' value."""
        page = httpx.get(f"{self.base_url}/metrics").text
        return float(next(row for row in page.splitlines() if row.startswith(line)).rpartition(" ")[2])

    def eventually(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def _read(self) -> None:
        assert self.process.stderr
        for line in filter(self._keeps, self.process.stderr):
            self.lines.append(line.rstrip("\n"))
