"""Makes the data files beside it: `python model_store/text/openai_encodings/make.py FILE.tiktoken...`.

A FILE is tiktoken's own rank file of an encoding, under any name: its sha256, tiktoken's `expected_hash`, tells which
encoding it is of. Needs nothing but Python.
"""

from __future__ import annotations

import base64
import hashlib
import lzma
import sys
from pathlib import Path

# tiktoken 0.14.0, tiktoken_ext/openai_public.py
RANK_FILES = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}


def pack(ranks: bytes) -> bytes:
    """A rank file's tokens in the order of their ids, xz'ed: one byte with the length of each, then the bytes of all.

    Raises:
        ValueError: if the ids are not 0, 1, 2, … or a token has no bytes or more than 255.
    """
    tokens: list[bytes] = []
    for line in ranks.splitlines():
        token, rank = line.split()
        if int(rank) != len(tokens):
            raise ValueError(f"id {int(rank)} where {len(tokens)} was due")
        tokens.append(base64.b64decode(token, validate=True))
    if not all(tokens):
        raise ValueError("a token has no bytes")
    return lzma.compress(bytes(map(len, tokens)) + b"".join(tokens), preset=9 | lzma.PRESET_EXTREME)


def main() -> int:
    for name in sys.argv[1:]:
        ranks = Path(name).read_bytes()
        encoding = RANK_FILES.get(hashlib.sha256(ranks).hexdigest())
        if encoding is None:
            print(f"{name}: not a rank file that this knows", file=sys.stderr)
            return 1
        packed = pack(ranks)
        file = Path(__file__).with_name(f"{encoding}.xz")
        file.write_bytes(packed)
        print(f"{file}: {len(packed):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
