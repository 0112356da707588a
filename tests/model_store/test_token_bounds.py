from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from model_store.text.token_bounds import characters_per_token
from tests.tiny import tiny_tokenizer

_TINY = tiny_tokenizer()
_BOUND = characters_per_token(_TINY) or 0


def test_no_text_has_more_characters_than_its_tokens_can_stand_for() -> None:
    random.seed(0)
    alphabet = [*"a \t\n é東🙂", "\u0301", "\u0345", "\ufb03", "\x00", "\u200d", " plane", "the river ran"]
    for _ in range(500):
        text = "".join(random.choices(alphabet, k=random.randrange(1, 60)))
        tokens = len(_TINY.encode(text, add_special_tokens=False).ids)
        assert len(text.rstrip()) <= _BOUND * tokens, repr(text)


def test_composed_characters_are_counted_as_what_they_were() -> None:
    text = "\u03b1\u0313\u0300\u0345" * 100
    assert len(text) <= _BOUND * len(_TINY.encode(text, add_special_tokens=False).ids)


def changed(change: Any) -> Tokenizer:
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        lambda own: setattr(own, "normalizer", normalizers.Replace("a", "")),
        lambda own: setattr(own, "normalizer", normalizers.StripAccents()),
        lambda own: setattr(own, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        lambda own: setattr(own, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda own: setattr(own, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
        lambda own: own.add_special_tokens([AddedToken("<x>", rstrip=True)]),
    ],
)
def test_a_step_that_may_drop_characters_has_no_bound(change: Any) -> None:
    assert characters_per_token(changed(change)) is None
