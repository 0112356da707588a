from __future__ import annotations

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from model_store.text import openai_tokens
from model_store.text.openai_tokens import OpenAIEncoding, UnknownTokenId, decode, decode_bytes, missing_id

# What tiktoken 0.14.0 encodes these to.
ENCODED: list[tuple[str, list[int], list[int]]] = [
    ("", [], []),
    ("The quick brown fox", [791, 4062, 14198, 39935], [976, 4853, 19705, 68347]),
    (
        "naïve café: “déjà vu”",
        [3458, 38672, 588, 53050, 25, 1054, 67, 978, 44424, 33614, 863],
        [1503, 9954, 737, 30469, 25, 966, 98340, 19483, 12005, 693],
    ),
    (
        "日本語のテキストと中文字符",
        [9080, 22656, 45918, 252, 16144, 57933, 62903, 71634, 19732, 16325, 17161, 49491],
        [9048, 40909, 3385, 16056, 18368, 38236, 5330, 10667, 67951],
    ),
    ("안녕하세요", [31495, 230, 75265, 243, 92245], [14307, 171731]),
    (
        "👩🏽‍🚀 lands 🇨🇭",
        [9468, 239, 102, 9468, 237, 121, 378, 235, 9468, 248, 222, 12098, 11410, 229, 101, 9468, 229, 255],
        [28823, 102, 52622, 121, 2524, 112927, 222, 26518, 173468, 101, 55506, 255],
    ),
    (
        'def f(x: int) -> str:\n\treturn f"{x!r}"\r\n',
        [755, 282, 2120, 25, 528, 8, 1492, 610, 512, 862, 282, 14461, 87, 0, 81, 92, 5139],
        [1314, 285, 4061, 25, 677, 8, 2747, 989, 734, 1393, 285, 27510, 87, 0, 81, 92, 10221],
    ),
    ("  two  spaces  ", [220, 1403, 220, 12908, 256], [220, 1920, 220, 18608, 256]),
    ("a<|endoftext|>b<|endofprompt|>", [64, 100257, 65, 100276], [64, 199999, 65, 200018]),
]


@pytest.mark.parametrize(("text", "cl100k", "o200k"), ENCODED)
def test_decodes_what_tiktoken_encodes(text: str, cl100k: list[int], o200k: list[int]) -> None:
    assert decode("cl100k_base", cl100k) == text
    assert decode("o200k_base", o200k) == text


# The digests that tiktoken itself checks its rank files by.
@pytest.mark.parametrize(
    ("encoding", "tokens", "sha256"),
    [
        ("cl100k_base", 100_256, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
        ("o200k_base", 199_998, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
    ],
)
def test_has_every_token_of_the_rank_file(encoding: OpenAIEncoding, tokens: int, sha256: str) -> None:
    rank_file = hashlib.sha256()
    for token_id in range(tokens):
        rank_file.update(b"%b %d\n" % (base64.b64encode(decode_bytes(encoding, [token_id])), token_id))
    assert rank_file.hexdigest() == sha256


def test_special_tokens_are_their_text() -> None:
    assert decode("cl100k_base", [100258, 100259, 100260]) == "<|fim_prefix|><|fim_middle|><|fim_suffix|>"


def test_a_piece_can_be_cut_inside_a_character() -> None:
    astronaut = [9468, 239, 102, 9468, 237, 121]  # 👩🏽, three tokens each
    assert decode("cl100k_base", astronaut) == "👩🏽"
    assert decode("cl100k_base", astronaut[:4]) == "👩\ufffd"
    assert decode("cl100k_base", astronaut[1:]) == "\ufffd\ufffd🏽"
    assert decode_bytes("cl100k_base", astronaut[:4]) == "👩🏽".encode()[:6]


@pytest.mark.parametrize(
    ("encoding", "token_id"),
    [
        ("cl100k_base", 100_256),
        ("cl100k_base", 100_261),
        ("cl100k_base", 100_277),
        ("cl100k_base", -1),
        ("cl100k_base", 2**70),
        ("o200k_base", 199_998),
        ("o200k_base", 200_000),
        ("o200k_base", 200_019),
        ("o200k_base", -1),
    ],
)
def test_an_id_without_a_token_is_named(encoding: OpenAIEncoding, token_id: int) -> None:
    with pytest.raises(UnknownTokenId, match=f"{encoding} .* {token_id}$") as error:
        decode(encoding, [64, token_id, 65])
    assert error.value.token_id == token_id


def test_threads_may_be_first_together() -> None:
    openai_tokens._load.cache_clear()
    text, ids, _ = ENCODED[3]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: decode("cl100k_base", ids), range(64))) == {text}


@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
def test_an_id_is_missing_exactly_if_it_has_no_text(encoding: OpenAIEncoding) -> None:
    assert missing_id(encoding, []) is None
    for token_id in (-1, 0, *range(100_200, 100_300), *range(199_990, 200_030), 2**31):
        try:
            decode_bytes(encoding, [token_id])
        except UnknownTokenId:
            assert missing_id(encoding, [5, token_id, 2**40]) == token_id
        else:
            assert missing_id(encoding, [5, token_id]) is None
