"""The use case without HTTP: what it admits, and what its results say of themselves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np
import pytest

from model_store.templates import Template
from model_store.text.tokenizer import ReferenceLimits, TextTokenizer, TokenizedText
from service.batching.batcher import MicroBatcher
from service.batching.limits import Limits
from service.embedding.embedder import Embedder
from service.embedding.requests import EmbedInput, EmbedRequest
from service.embedding.rows import EmbedRow, Vector
from service.embedding.tokenizing import slice_ends
from service.errors import InvalidRequest, Unavailable
from service.metrics import Metrics
from service.settings import Settings
from tests.service.fakes import NO_TOKENS, WIDTH, FakeTokenizer, FakeWorker, fake_manifest, fake_vector
from tests.tiny import VOCABULARY, tiny_tokenizer


@asynccontextmanager
async def embedder(worker: FakeWorker, **given: Any) -> AsyncIterator[Embedder]:
    settings, manifest, metrics = Settings(**given), fake_manifest(), Metrics()
    limits = Limits(settings, manifest, "cpu")
    batcher: MicroBatcher[EmbedRow, Vector] = MicroBatcher(worker.run_batch, metrics)
    running = asyncio.create_task(batcher.run(await worker.start(limits)))
    await asyncio.sleep(0)
    one = Embedder(manifest, FakeTokenizer(), batcher, settings, limits, metrics)
    try:
        yield one
    finally:
        one.close()
        running.cancel()
        await asyncio.wait({running})


def request(*texts: str, **fields: Any) -> EmbedRequest:
    return EmbedRequest([EmbedInput(text) for text in texts], **fields)


async def test_a_result_carries_its_own_measurements() -> None:
    async with embedder(FakeWorker()) as one:
        result = await one.embed(request("abc", "de"))
    assert result.prompt_tokens == 7
    assert result.truncated_inputs == 0
    timings = result.timings
    assert min(timings.tokenize_seconds, timings.queue_seconds, timings.inference_seconds) >= 0
    np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, rtol=1e-6)


class CutsItself(FakeTokenizer):
    """As under reference truncation: no text keeps more than four of its characters."""

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        rows = super().encode_batch(texts, instructions)
        return [row.shortened(row.head + 4) for row in rows]

    def locate(self, text: str, instruction: str) -> tuple[TokenizedText, list[tuple[int, int]]]:
        return FakeTokenizer().locate(text, instruction)


async def test_a_preview_has_what_the_tokenizer_cut_by_itself() -> None:
    async with embedder(FakeWorker()) as one:
        one.tokenizer = CutsItself()
        long, short = await one.preview(request("abcdefg", "abcd"))
        assert [token.text for token in long if not token.cut] == ["", *"abcd"]
        assert [token.text for token in long if token.cut] == [*"efg"]
        assert [token.pooled for token in long] == [False, *[True] * 4, *[False] * 3]
        assert not any(token.cut for token in short)


async def test_a_text_that_reference_truncation_leaves_nothing_of_is_refused() -> None:
    """Unless the official library's vector is asked for, which all such texts have in common."""
    rows = TextTokenizer(tiny_tokenizer(), Template(), True, VOCABULARY, ReferenceLimits(64, 20))
    asked = request("a river", "東京" * 30, "x" * 100)
    async with embedder(FakeWorker()) as one:
        one.tokenizer = rows
        with pytest.raises(InvalidRequest, match=r"^input index 1: .*LLM2VEC_EMPTY_TEXT=bos") as caught:
            await one.embed(asked)
        assert caught.value.code == "invalid_input"
        assert len((await one.embed(request("a river", "the river " * 20))).vectors) == 2
    async with embedder(FakeWorker(), empty_text="bos") as one:
        one.tokenizer = rows
        result = await one.embed(asked)
        assert result.truncated_inputs == 2
        np.testing.assert_array_equal(result.vectors[1], result.vectors[2])


@pytest.mark.parametrize("keep", ["start", "end"])
async def test_a_preview_has_a_template_that_was_cut_off_with_the_text(keep: Literal["start", "end"]) -> None:
    template = Template("[INST] ", " [/INST]", strip=True)
    async with embedder(FakeWorker()) as one:
        one.tokenizer = TextTokenizer(tiny_tokenizer(), template, True, VOCABULARY, ReferenceLimits(10, 400))
        (found,) = await one.preview(request("the river ran past the mill", keep=keep))
    assert "".join(token.text for token in found) == "<bos>[INST] the river ran past the mill [/INST]"
    assert [token.cut for token in found] == [False] * 10 + [True] * (len(found) - 10)
    cut = [token.part for token in found if token.cut]
    assert cut == sorted(cut, reverse=True)
    assert set(cut) == {"text", "template"}


async def test_many_texts_tokenized_in_slices_keep_their_order() -> None:
    texts = [f"text {number}" for number in range(300)]
    async with embedder(FakeWorker(), tokenizer_threads=4) as one:
        result = await one.embed(request(*texts))
    rows = FakeTokenizer().encode_batch(texts, [""] * 300)
    assert (np.stack(result.vectors) == np.stack([fake_vector(EmbedRow(row, WIDTH)) for row in rows])).all()


async def test_a_text_beside_an_empty_one_is_named_by_its_own_index() -> None:
    async with embedder(FakeWorker(), empty_text="bos") as one:
        result = await one.embed(request("", "abc", " ", "de"))
        assert result.prompt_tokens == 1 + 4 + 1 + 3
        with pytest.raises(InvalidRequest, match=r"^input index 3: ") as caught:
            await one.embed(request("", "abc", " ", NO_TOKENS, "de"))
        assert caught.value.code == "invalid_input"
        ids = EmbedRequest([EmbedInput(""), EmbedInput("abc"), EmbedInput([-1])])
        with pytest.raises(InvalidRequest, match=r"^input index 2: ") as caught:
            await one.embed(ids)
        assert caught.value.code == "invalid_token_ids"


class CountsCharacters(FakeTokenizer):
    """Remembers how much it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        self.characters += sum(map(len, texts))
        return super().encode_batch(texts, instructions)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"requested 8001 tokens \(input index 300\)"),
        ({"overflow": "mean"}, "tokens in one request"),
        ({"overflow": "truncate"}, "tokens in one request"),
    ],
)
async def test_tokenizing_ends_where_a_request_is_refused(fields: dict[str, Any], message: str) -> None:
    async with embedder(FakeWorker(), tokenizer_threads=1) as one:
        one.tokenizer = tokenizer = CountsCharacters()
        texts = ["a"] * 300 + ["b" * 8000] * 1748
        with pytest.raises(InvalidRequest, match=message):
            await one.embed(request(*texts, **fields))
    assert tokenizer.characters < sum(map(len, texts)) / 2


async def test_the_first_input_that_is_too_long_is_named_whichever_is_tokenized_first() -> None:
    async with embedder(FakeWorker(), tokenizer_threads=4) as one:
        texts = ["a" * 500] * 70 + ["b" * 600] * 1000
        for _ in range(5):
            with pytest.raises(InvalidRequest, match=r"\(input index 70\)"):
                await one.embed(request(*texts))


def test_slices_are_of_few_texts_and_few_characters() -> None:
    chance = random.Random(0)
    for _ in range(200):
        lengths = [chance.choice((0, 1, 1000, 100_000, 500_000)) for _ in range(chance.randrange(1, 200))]
        given = [EmbedInput("a" * length) for length in lengths]
        slices = list(slice_ends(given))
        assert [place for start, stop in slices for place in range(start, stop)] == list(range(len(given)))
        for start, stop in slices:
            assert stop - start <= 64
            assert stop - start == 1 or sum(lengths[start:stop]) <= 1 << 18


async def test_requests_of_many_inputs_or_tokens_are_bulk() -> None:
    worker = FakeWorker()
    async with embedder(worker, batch_tokens=40) as one:
        for asked in (request(*"abcd"), request(*"efghi"), request("j" * 25)):
            await one.embed(asked)
        page = one.metrics.page().decode()
    assert 'queue_wait_seconds_count{class="interactive"} 4.0' in page
    assert 'queue_wait_seconds_count{class="bulk"} 6.0' in page


async def test_bad_requests_compute_nothing() -> None:
    worker = FakeWorker()
    async with embedder(worker, max_inputs_per_request=2) as one:
        for bad in (request(), request("a", " "), request("a", "b", "c"), request("a", dimensions=99)):
            with pytest.raises(InvalidRequest):
                await one.embed(bad)
    assert worker.batches == []


async def test_probe_goes_through_the_device() -> None:
    worker = FakeWorker()
    async with embedder(worker) as one:
        await one.probe()
        assert len(worker.batches) == 1
    with pytest.raises(Unavailable):
        await one.probe()
