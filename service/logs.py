"""Logs as JSON, one line for each event, with the id of its request. They never hold input text."""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

from model_store.errors import explains_itself
from service.errors import ServiceError

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

log = logging.getLogger("llm2vec")


class JsonFormatter(logging.Formatter):
    """One JSON object for each record. The entries of extra={"fields": {...}} become its keys."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return _line(record.created, record.levelname.lower(), record.getMessage(), fields)


def log_request(level: int, fields: dict[str, Any]) -> None:
    """Write a request's line, if its level is on. It makes no log record, which would cost as much as routing."""
    if log.isEnabledFor(level):
        sys.stderr.write(_line(time.time(), logging.getLevelName(level).lower(), "request", fields) + "\n")


def unexplained(error: BaseException) -> BaseException | None:
    """The error, to pass as `exc_info`; None if its message already tells everything."""
    return None if isinstance(error, ServiceError) or explains_itself(error) else error


def _line(created: float, level: str, message: str, fields: dict[str, Any]) -> str:
    line = {
        "time": datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "message": message,
        **({"request_id": current} if (current := request_id.get()) else {}),
        **fields,
    }
    return orjson.dumps(line, default=str).decode()


def configure_logs(level: str) -> None:
    """Send every log line of the process to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # The line of code, thread and process of each record are not written, so they need not be looked up.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for noisy in ("httpx", "httpcore", "asyncio", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
