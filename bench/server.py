"""A server in a process of its own, as its users start it: that of this project or another one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from model_store.manifest import Manifest
from service.server.startup import prepare_store
from service.settings import Settings

_STOP_SECONDS = 20.0


def stored(model: str) -> tuple[Path, Manifest]:
    """The folder and the manifest of a stored encoder or of a recipe, which is built if need be."""
    return prepare_store(Settings(model=model), lambda done, total: None)


@dataclass(frozen=True)
class Server:
    """A running server and its log."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def said(self, message: str) -> list[dict[str, Any]]:
        """The lines with this message so far, where the log is of JSON lines."""
        lines = self.log.read_text(errors="replace").splitlines(keepends=True)
        return [json.loads(line) for line in lines if f'"message":"{message}"' in line and line.endswith("}\n")]

    def metric(self, name: str) -> float:
        """One series' value."""
        with urlopen(f"{self.url}/metrics") as page:
            rows = page.read().decode().splitlines()
        return float(next(row for row in rows if row.startswith(name)).rpartition(" ")[2])

    def send(self, given: signal.Signals) -> None:
        """Send a signal to each of its processes."""
        os.killpg(self.process.pid, given)


@contextmanager
def running(
    command: Sequence[str | Path],
    port: int,
    environment: Mapping[str, object],
    ready: str = "/readyz",
    folder: Path | None = None,
    seconds: float = 300.0,
) -> Iterator[Server]:
    """A server that is ready, until the block is left. An exception gets the end of the log as a note.

    Its environment is this process's without settings of the service, and `environment`.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLM2VEC_")}
    environment = inherited | {name: str(value) for name, value in environment.items()}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        server = Server(port, process, Path(log.name))
        try:
            _wait_until_ready(server, ready, seconds)
            yield server
        except Exception as error:
            error.add_note("its log ends:\n" + "\n".join(server.log.read_text(errors="replace").splitlines()[-60:]))
            raise
        finally:
            for stop in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    server.send(stop)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0 if stop is signal.SIGCONT else _STOP_SECONDS)


@contextmanager
def serving(
    model: Path,
    environment: Mapping[str, object],
    module: str = "service",
    cores: Sequence[Sequence[int]] = (),
    seconds: float = 300.0,
) -> Iterator[Server]:
    """`llm2vec-service serve`, or a module that varies it. `environment` has the settings.

    `cores` are those of the server and those that this process has from then on, if both are to be kept apart.
    """
    if cores and not all(cores):
        raise SystemExit("the server and its clients need a core each")
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--model", str(model), "--port", str(port)]
    if cores:
        os.sched_setaffinity(0, cores[0])
    with running(command, port, environment, seconds=seconds) as server:
        if cores:
            os.sched_setaffinity(0, cores[1])
        yield server


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_until_ready(server: Server, path: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"it ended with status {server.process.returncode} before it was ready")
        with suppress(OSError), urlopen(server.url + path, timeout=10):  # any status but a good one is an OSError too
            return
        time.sleep(0.1)
    raise RuntimeError(f"it was not ready after {seconds:.0f} s")
