"""Who may ask: the keys that clients send, in the header of each dialect, and the paths that need no key.

Only the SHA-256 hashes of keys are kept, and a file of keys may change at any time.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from service.embedding.admission import caller_number
from service.errors import StartupError, Unauthorized
from service.logs import log
from service.settings import Settings, hash_keys

# Orchestrators ask for these paths, and have no key.
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
METRICS_PATH = "/metrics"

_MISSING = "an API key is needed: send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`"

_LOOK_AGAIN_SECONDS = 1.0


class Access:
    """If there are keys, every path needs one of them, except the health checks. Metrics have a key of their own.

    Everybody can read the pages; the requests that a page sends need a key.

    OpenAI's, Cohere's, NVIDIA's, Ollama's, Infinity's and text-embeddings-inference's clients send
    `Authorization: Bearer KEY`; some gateways `x-api-key: KEY`, Azure's `api-key: KEY`.
    """

    def __init__(self, settings: Settings, pages: Collection[str] = ()) -> None:
        """Raises: StartupError: if the file of keys can't be read."""
        self._keys = ApiKeys(settings.api_keys, settings.api_keys_file)
        self._pages = pages
        self._metrics_key = ApiKeys(settings.metrics_key)

    def refusal(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Unauthorized | None:
        """The reason to refuse a request; None if it may be served."""
        keys = self._metrics_key if path == METRICS_PATH else self._keys
        if not keys.required or path in OPEN_PATHS or (path in self._pages and method == "GET"):
            return None
        given = _given_keys(headers)
        known = [keys.knows(key) for key in given]
        if any(known):
            return None
        return Unauthorized("the API key is not valid" if given else _MISSING)

    def caller(self, headers: Mapping[bytes, bytes], client: object) -> int:
        """The number of a request's caller: one for each key, or for each connection if no key is needed."""
        if self._keys.required:
            for key in _given_keys(headers):
                if self._keys.knows(key):
                    return caller_number(key)
        return caller_number(repr(client).encode())

    def close(self) -> None:
        self._keys.close()


class ApiKeys:
    """The keys that are valid now. Asking costs two microseconds, and as long for a wrong key as for a right one."""

    def __init__(self, hashes: Sequence[str], file: Path | None = None) -> None:
        """The file's keys come on top of those given.

        Raises:
            StartupError: if the file can't be read, or there is no key in it.
        """
        self.required = bool(hashes) or file is not None
        self._given = self._digests = _digests(hashes)
        self._file = file and file.expanduser()
        self._stopped = threading.Event()
        if self._file:
            self._seen = _state(self._file)
            self._digests += self._first_keys(self._file)
            threading.Thread(target=self._watch, name="api keys", daemon=True).start()

    def knows(self, key: bytes) -> bool:
        """Whether this is one of the keys. It is compared with all of them, so that the time says nothing."""
        digest, found = hashlib.sha256(key).digest(), False
        for own in self._digests:
            found |= hmac.compare_digest(digest, own)
        return found

    def close(self) -> None:
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

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_AGAIN_SECONDS):
            self.look()


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line, `#` before comments, as they are kept.

    Raises:
        OSError, ValueError: if it can't be read, or a line is no key.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return hash_keys(key for number, line in enumerate(lines, 1) if (key := _key_in(line, number)))


def _given_keys(headers: Mapping[bytes, bytes]) -> list[bytes]:
    keys = []
    if authorization := headers.get(b"authorization"):
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and key.strip():
            keys.append(key.strip())
    return keys + [key for name in (b"x-api-key", b"api-key") if (key := headers.get(name, b"").strip())]


def _key_in(line: str, number: int) -> str:
    """The key before a comment. A `#` right after the key is refused: the key could go on with it."""
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
