"""Order, masking and batches: all a function of an example's place in a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model_store.templates import Template
from model_store.text.tokenizer import TextTokenizer
from model_store.training.examples import (
    NO_LABEL,
    ContrastiveBatches,
    MaskedBatches,
    Masking,
    Order,
    TokenRows,
)
from model_store.training.texts import Example, TrainingDataError
from tests.tiny import VOCABULARY, tiny_tokenizer

MASK = 7


def masking(**changes: Any) -> Masking:
    untouched = np.zeros(VOCABULARY, dtype=bool)
    untouched[:3] = True
    return Masking(
        **{"mask_token": MASK, "probability": 0.2, "mixed": False, "untouched": untouched, "seed": 1, **changes}
    )


def test_an_epoch_is_every_example_once_in_another_order() -> None:
    order = Order([""] * 50, batch=5, seed=3)
    first, again = list(order), list(order)
    order.set_epoch(1)
    second = list(order)
    assert first == again
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(50))
    assert [index for _, index in first] != [index for _, index in second] != list(range(50))
    assert {epoch for epoch, _ in second} == {1}
    assert list(Order([""] * 50, batch=5, seed=4)) != first


def test_a_batch_is_of_one_group() -> None:
    groups = ["a", "b", "c"] * 9 + ["b"] * 5
    order = Order(groups, batch=4, seed=0)
    places = list(order)
    batches = [[groups[index] for _, index in places[start : start + 4]] for start in range(0, len(places), 4)]
    assert len(order) == len(places) == 4 * len(batches)
    assert all(len(set(batch)) == 1 for batch in batches)
    # 9, 14 and 9 examples are 2, 3 and 2 batches, shuffled among each other.
    assert sorted(batch[0] for batch in batches) == list("aabbbcc")
    assert [batch[0] for batch in batches] != list("aabbbcc")


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(TrainingDataError, match="3 examples don't fill a batch of 4"):
        Order([""] * 3, batch=4, seed=0)


def test_masking_hides_the_share_asked_for_and_no_special_token() -> None:
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=20000)
    shown, labels = masking().of(tokens, (0, 5))
    hidden = labels != NO_LABEL
    touchable = tokens >= 3
    assert not hidden[~touchable].any()
    assert 0.19 < hidden[touchable].mean() < 0.21  # standard error 0.003
    assert (shown[hidden] == MASK).all()
    assert (labels[hidden] == tokens[hidden]).all()
    assert (shown[1:] == tokens[1:])[~hidden[1:]].all()


def test_of_mixed_masking_a_tenth_is_random_and_a_tenth_stays() -> None:
    tokens = np.random.default_rng(0).integers(10, VOCABULARY, size=50000)
    shown, labels = masking(mixed=True, probability=0.5).of(tokens, (0, 0))
    hidden = labels != NO_LABEL
    masked, same = (shown == MASK)[hidden].mean(), (shown == tokens)[hidden].mean()
    assert 0.79 < masked < 0.81
    assert 0.09 < same < 0.11
    assert 0.09 < 1 - masked - same < 0.11


def test_nothing_predicts_the_first_token() -> None:
    shown, labels = masking(probability=1.0).of(np.arange(10, 20), (0, 0))
    assert (shown == MASK).all()
    assert labels[0] == NO_LABEL
    assert (labels[1:] != NO_LABEL).all()


def test_masking_is_a_function_of_the_place() -> None:
    tokens = np.arange(10, 300)
    hidden = {
        (seed, place): tuple(masking(seed=seed).of(tokens, place)[1])
        for seed in (1, 2)
        for place in ((0, 0), (0, 1), (1, 0))
    }
    assert len(set(hidden.values())) == 6
    assert tuple(masking().of(tokens, (0, 1))[1]) == hidden[1, (0, 1)]


def test_rows_and_blocks() -> None:
    rows = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11]]
    arrays = [np.array(row, dtype=np.int32) for row in rows]
    assert [TokenRows(arrays)[(0, index)][0].tolist() for index in range(3)] == rows
    blocks = TokenRows.in_blocks(arrays, 4)
    assert [blocks[(0, index)][0].tolist() for index in range(len(blocks))] == [[1, 5, 6, 1], [7, 1, 8, 9]]


def test_rows_are_packed_with_their_labels() -> None:
    rows = TokenRows([np.arange(10, 30, dtype=np.int32), np.arange(40, 45, dtype=np.int32)])
    batch = MaskedBatches(masking(probability=0.5))([rows[(2, 0)], rows[(2, 1)]])
    assert batch["cu_seqlens"].tolist() == [0, 20, 25]
    assert batch["position_ids"].tolist() == [*range(20), *range(5)]
    assert batch["longest"] == 20
    for start, end, index in ((0, 20, 0), (20, 25, 1)):
        shown, labels = masking(probability=0.5).of(*rows[(2, index)])
        assert batch["token_ids"][start:end].tolist() == shown.tolist()
        assert batch["labels"][start:end].tolist() == labels.tolist()


def batches(chunk: int | None = None, longest: int = 64) -> ContrastiveBatches:
    tokenizer = TextTokenizer(tiny_tokenizer(), Template("<", ">"), True, VOCABULARY)
    return ContrastiveBatches(tokenizer, "mean", longest, chunk)


def pairs(count: int) -> list[Example]:
    return [Example(f"text {n}", (f"text {n}",)) for n in range(count)]


def test_queries_then_the_passages_of_each() -> None:
    """As many as each query has; all of them are used."""
    examples = [
        Example(
            "query 0", ("positive 0",), ("negative 0", "another 0"), "Find it:", "Passage:", scores=(3.0, 2.0, 1.0)
        ),
        Example("query 1", ("positive 1", "another 1"), scores=(5.0, 4.0)),
    ]
    batch = batches()(examples)
    texts = ["query 0", "query 1", "positive 0", "negative 0", "another 0", "positive 1", "another 1"]
    expected = batches().tokenizer.encode_batch(texts, ["Find it:", "", *["Passage:"] * 3, "", ""])
    (chunk,) = batch["chunks"]
    assert batch["queries"] == 2
    assert chunk["token_ids"].tolist() == [token for row in expected for token in row.token_ids]
    assert chunk["pooling_weights"].sum() == sum(len(row) - row.span_start for row in expected)
    assert expected[0].span_start > expected[1].span_start  # the instruction is not pooled
    assert {name: part.tolist() for name, part in batch["beside"].items()} == {
        "owners": [0, 0, 0, 1, 1],
        "positive": [True, False, False, True, True],
        "scores": [3.0, 2.0, 1.0, 5.0, 4.0],
    }


def test_chunks_hold_so_many_texts_and_no_more() -> None:
    chunks = batches(chunk=4)(pairs(5))["chunks"]
    assert [len(chunk["cu_seqlens"]) - 1 for chunk in chunks] == [4, 4, 2]
    whole = batches()(pairs(5))["chunks"][0]
    assert torch.equal(torch.cat([chunk["token_ids"] for chunk in chunks]), whole["token_ids"])


def test_a_long_text_gives_up_its_own_tokens_and_no_others() -> None:
    (chunk,) = batches(longest=10)([Example("word " * 50, ("word " * 50,))])["chunks"]
    tokenizer = tiny_tokenizer()
    row = chunk["token_ids"][:10].tolist()
    assert chunk["cu_seqlens"].tolist() == [0, 10, 20]
    assert tokenizer.decode(row)[0] == "<"
    assert tokenizer.decode(row)[-1] == ">"


def test_a_text_without_tokens_is_named() -> None:
    tokenizer = TextTokenizer(tiny_tokenizer(), Template(), True, VOCABULARY)
    collate = ContrastiveBatches(tokenizer, "mean", 64, None)
    with pytest.raises(TrainingDataError, match="no tokens, in the text that begins ''"):
        collate([Example("fine", ("fine",)), Example("", ("fine",))])
