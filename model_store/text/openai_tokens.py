"""OpenAI's token ids → text: clients such as LangChain send a text as the ids that tiktoken gave it.

Needs neither tiktoken nor a network: the tokens lie in `openai_encodings`. It knows no merges, so it can't encode.
And it can't tell which encoding a client used, because most ids have a token in each.
"""

from __future__ import annotations

import lzma
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Literal

from model_store.errors import UserError

OpenAIEncoding = Literal["cl100k_base", "o200k_base"]

# Special tokens have ids above all others, with gaps between them (tiktoken 0.14.0, tiktoken_ext/openai_public.py).
_SPECIAL_TOKENS: Mapping[OpenAIEncoding, Mapping[int, bytes]] = {
    "cl100k_base": {
        100257: b"<|endoftext|>",
        100258: b"<|fim_prefix|>",
        100259: b"<|fim_middle|>",
        100260: b"<|fim_suffix|>",
        100276: b"<|endofprompt|>",
    },
    "o200k_base": {199999: b"<|endoftext|>", 200018: b"<|endofprompt|>"},
}
_TOKENS: Mapping[OpenAIEncoding, int] = {"cl100k_base": 100_256, "o200k_base": 199_998}


class UnknownTokenId(UserError):
    """An id that the encoding has no token for; `token_id` is that id."""

    def __init__(self, encoding: OpenAIEncoding, token_id: int) -> None:
        super().__init__(f"{encoding} has no token with the id {token_id}")
        self.token_id = token_id


def missing_id(encoding: OpenAIEncoding, token_ids: Sequence[int]) -> int | None:
    """The first id that the encoding has no token for, None if there is no such id. Loads nothing."""
    count, special_tokens = _TOKENS[encoding], _SPECIAL_TOKENS[encoding]
    if min(token_ids, default=0) >= 0 and max(token_ids, default=0) < count:
        return None
    return next((one for one in token_ids if not 0 <= one < count and one not in special_tokens), None)


def decode(encoding: OpenAIEncoding, token_ids: Sequence[int]) -> str:
    """The text of `token_ids`, as tiktoken's `decode` gives it. Safe to call from several threads at once.

    A piece that was cut out of a longer text can begin or end inside a character: the bytes of such a character become
    U+FFFD. The first call for an encoding loads it: some 20 ms and 1 MB for cl100k_base, twice that for o200k_base.
    """
    return decode_bytes(encoding, token_ids).decode(errors="replace")


def decode_bytes(encoding: OpenAIEncoding, token_ids: Sequence[int]) -> bytes:
    """The bytes of `token_ids`, at most 128 for each id; they need not be whole characters.

    Raises:
        UnknownTokenId: at the first id that the encoding has no token for.
    """
    if (missing := missing_id(encoding, token_ids)) is not None:
        raise UnknownTokenId(encoding, missing)
    data, starts = _load(encoding)
    special_tokens = _SPECIAL_TOKENS[encoding]
    return b"".join(special_tokens.get(one) or data[starts[one] : starts[one + 1]] for one in token_ids)


@cache  # several threads may load it at the same time at first, with the same result
def _load(encoding: OpenAIEncoding) -> tuple[bytes, array[int]]:
    """(data, starts) of a file that `openai_encodings/make.py` packed: token `i` is `data[starts[i]:starts[i + 1]]`.

    300,000 bytes objects would take ten times the memory.
    """
    data = lzma.decompress(files("model_store.text").joinpath("openai_encodings", f"{encoding}.xz").read_bytes())
    count = _TOKENS[encoding]
    return data, array("I", accumulate(data[:count], initial=count))
