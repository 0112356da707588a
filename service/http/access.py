"""Who may ask: the keys that clients send, in the header of each dialect, and the paths that need no key."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from service.embedding.admission import caller_number
from service.errors import Unauthorized
from service.http.api_keys import ApiKeys
from service.settings import Settings

# Orchestrators ask for these paths, and have no key.
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping"})
METRICS_PATH = "/metrics"


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
        """Stop watching the file of keys."""
        self._keys.close()


_MISSING = "an API key is needed: send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`"


def _given_keys(headers: Mapping[bytes, bytes]) -> list[bytes]:
    keys = []
    if authorization := headers.get(b"authorization"):
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and key.strip():
            keys.append(key.strip())
    return keys + [key for name in (b"x-api-key", b"api-key") if (key := headers.get(name, b"").strip())]
