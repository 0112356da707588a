"""The keys that open the server. Only their SHA-256 hashes are kept, and a file of keys may change at any time.

This module knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from service.errors import StartupError
from service.logs import log
from service.settings import hash_keys

_LOOK_AGAIN_SECONDS = 1.0


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line, `#` before comments, as they are kept.

    Raises:
        OSError, ValueError: if it can't be read, or a line is no key.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return hash_keys(key for number, line in enumerate(lines, 1) if (key := _key_in(line, number)))


class ApiKeys:
    """The keys that are valid now. Asking costs two microseconds, and as long for a wrong key as for a right one."""

    def __init__(self, hashes: Sequence[str], file: Path | None = None) -> None:
        """The file's keys come on top of those given.

        Raises:
            StartupError: if the file can't be read, or there is no key in it.
        """
        self.required = bool(hashes) or file is not None
        self._given = _digests(hashes)
        self._digests = self._given
        self._file = file and file.expanduser()
        self._stopped = threading.Event()
        if self._file:
            self._seen = _state(self._file)
            self._digests = self._given + self._first_keys(self._file)
            threading.Thread(target=self._watch, args=(self._file,), name="api keys", daemon=True).start()

    def knows(self, key: bytes) -> bool:
        """Whether this is one of the keys. It is compared with all of them, so that the time says nothing."""
        digest, found = hashlib.sha256(key).digest(), False
        for own in self._digests:
            found |= hmac.compare_digest(digest, own)
        return found

    def close(self) -> None:
        """Stop watching the file."""
        self._stopped.set()

    def look(self) -> None:
        """Read the file again if it has changed. A file that can't be read leaves the keys as they are."""
        if self._file is None or (state := _state(self._file)) == self._seen:
            return
        self._seen = state
        try:
            keys = read_keys(self._file)
        except (OSError, ValueError) as error:
            log.error("the API keys stay as they were: %s can't be read (%s)", self._file, _reason(error))
            return
        self._digests = self._given + _digests(keys)
        log.info("API keys read again", extra={"fields": {"keys": len(self._digests)}})

    @staticmethod
    def _first_keys(file: Path) -> tuple[bytes, ...]:
        try:
            keys = read_keys(file)
        except (OSError, ValueError) as error:
            raise StartupError(f"LLM2VEC_API_KEYS_FILE: {file} can't be read: {_reason(error)}") from None
        if not keys:
            raise StartupError(f"LLM2VEC_API_KEYS_FILE: there is no key in {file}: write one a line")
        return _digests(keys)

    def _watch(self, file: Path) -> None:
        while not self._stopped.wait(_LOOK_AGAIN_SECONDS):
            self.look()


def _key_in(line: str, number: int) -> str:
    """The key before a comment.

    Raises:
        ValueError: for a `#` right after the key: the key could go on with it.
    """
    before, hash_sign, _ = line.partition("#")
    if hash_sign and before.strip() and not before[-1].isspace():
        raise ValueError(
            f"line {number} has a # inside a key: write a space before a comment, and a key with a # as its hash"
        )
    return before.strip()


def _digests(hashes: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(value.removeprefix("sha256:")) for value in hashes)


def _state(file: Path) -> tuple[int, int, int] | None:
    """A value that changes whenever the file is written again or replaced."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _reason(error: Exception) -> str:
    """The reason without the content of the file: a decoder's own message would show some of it."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
