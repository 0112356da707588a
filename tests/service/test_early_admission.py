"""A request that finds no room is refused before its texts are tokenized, or waits where few others do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

from model_store.text.tokenizer import TokenizedText
from service.batching.batcher import MicroBatcher
from service.batching.limits import Limits
from service.embedding.embedder import Embedder
from service.embedding.requests import EmbedInput, EmbedRequest
from service.embedding.rows import EmbedRow, Vector
from service.errors import InvalidRequest, Overloaded
from service.metrics import Metrics
from service.settings import Settings
from tests.service.fakes import FakeTokenizer, FakeWorker, fake_manifest, until
from tests.service.test_batcher import plan


class Counting(FakeTokenizer):
    """Counts the texts that it is given. While it is to hold, its threads wait; the event loop never does."""

    def __init__(self) -> None:
        self.texts = 0
        self.held = 0
        self.hold = threading.Event()
        self.hold.set()

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        self.texts += len(texts)
        self._wait()
        return super().encode_batch(texts, instructions)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self._wait()
        return super().decode(token_ids, skip_special_tokens)

    def _wait(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.held += 1
            assert self.hold.wait(10)


@pytest.fixture
def parts() -> Iterator[tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting]]:
    """An embedder whose batcher queues 100 tokens, and computes nothing yet."""
    metrics, settings, manifest = Metrics(), Settings(max_queued_tokens=100), fake_manifest()
    batcher: MicroBatcher[EmbedRow, Vector] = MicroBatcher(FakeWorker().run_batch, metrics, None, 100)
    tokenizer = Counting()
    embedder = Embedder(manifest, tokenizer, batcher, settings, Limits(settings, manifest, "cpu"), metrics)
    yield embedder, batcher, tokenizer
    embedder.close()


def asked(text: str, wait_seconds: float = 0.0) -> EmbedRequest:
    return EmbedRequest([EmbedInput(text)], lane="bulk", wait_seconds=wait_seconds)


async def test_what_finds_no_room_is_not_tokenized(
    parts: tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting],
) -> None:
    embedder, batcher, tokenizer = parts
    waiting = asyncio.create_task(embedder.embed(asked("x" * 90)))  # 91 tokens, and nothing computes them
    await until(lambda: batcher.queued_in("bulk"))
    with pytest.raises(Overloaded):
        await embedder.embed(asked("y" * 200))
    assert tokenizer.texts == 1
    with pytest.raises(Overloaded):  # one that the guess lets through is refused by its tokens
        await embedder.embed(asked("z" * 20))
    assert tokenizer.texts == 2
    waiting.cancel()
    await asyncio.wait({waiting})


async def test_what_is_only_tokenized_is_admitted_like_what_is_embedded(
    parts: tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting],
) -> None:
    embedder, batcher, tokenizer = parts
    waiting = asyncio.create_task(embedder.embed(asked("x" * 90)))
    await until(lambda: batcher.queued_in("bulk"))
    for large in (
        embedder.preview(asked("y" * 200)),
        embedder.locate(asked("y" * 200)),
        embedder.decode([[65] * 20]),
        embedder.embed_chunks(EmbedRequest([EmbedInput("y" * 200)], lane="bulk"), 8),
    ):
        with pytest.raises(Overloaded):
            await large
    assert tokenizer.texts == 1
    assert len(await embedder.preview(asked("y" * 20))) == 1  # 5 tokens by the guess
    assert len(await embedder.locate(asked("y" * 20))) == 1
    assert await embedder.decode([[65] * 8]) == ["A" * 8]
    waiting.cancel()
    await asyncio.wait({waiting})


@pytest.mark.parametrize(
    "work",
    [
        lambda embedder: embedder.preview(asked("x" * 600)),
        lambda embedder: embedder.locate(asked("x" * 600)),
        lambda embedder: embedder.decode([[65] * 90]),
    ],
)
async def test_what_is_only_tokenized_counts_as_queued_meanwhile(
    parts: tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting],
    work: Callable[[Embedder], Coroutine[Any, Any, list[Any]]],
) -> None:
    embedder, _, tokenizer = parts
    tokenizer.hold.clear()
    task = asyncio.create_task(work(embedder))
    await until(lambda: tokenizer.held)
    with pytest.raises(Overloaded):
        await embedder.embed(asked("y" * 200))
    patient = asyncio.create_task(embedder.preview(asked("z" * 200, wait_seconds=1e6)))
    await asyncio.sleep(0)
    tokenizer.hold.set()
    assert len(await task) == len(await patient) == 1


async def test_the_lane_is_not_chosen_by_a_priority_that_the_tokens_are_too_many_for(
    parts: tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting],
) -> None:
    embedder, batcher, _ = parts
    computing = asyncio.create_task(batcher.run(plan(batch_tokens=40)))
    await asyncio.sleep(0)

    def interactive(*texts: str) -> EmbedRequest:
        return EmbedRequest([EmbedInput(text) for text in texts], lane="interactive")

    assert (await embedder.embed(interactive(*"abcdefghij"))).prompt_tokens == 20  # as many inputs as fit
    for request in (interactive("x" * 20), interactive("x" * 400), interactive(*"abcdefghijk")):
        with pytest.raises(InvalidRequest, match=r"at most 20, half a batch.* leave priority out") as refused:
            await embedder.embed(request)
        assert (refused.value.code, refused.value.param) == ("request_too_large", "priority")
    with pytest.raises(InvalidRequest, match="leave priority out"):
        await embedder.embed_chunks(EmbedRequest([EmbedInput("x" * 30)], lane="interactive"), 8)
    computing.cancel()
    await asyncio.wait({computing})


async def test_a_large_request_is_not_tokenized_before_bulk_for_its_priority(
    parts: tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting],
) -> None:
    embedder, batcher, tokenizer = parts
    computing = asyncio.create_task(batcher.run(plan(batch_tokens=40)))
    await asyncio.sleep(0)
    tokenizer.hold.clear()
    large = asyncio.create_task(embedder.embed(EmbedRequest([EmbedInput("x" * 600)], lane="interactive")))
    await until(lambda: tokenizer.held)
    # It takes none of the room of queries while it is tokenized.
    assert (await embedder.embed(EmbedRequest([EmbedInput("q" * 15)]))).prompt_tokens == 16
    with pytest.raises(Overloaded):
        await embedder.embed(asked("y"))
    tokenizer.hold.set()
    with pytest.raises(InvalidRequest):
        await large
    computing.cancel()
    await asyncio.wait({computing})


async def test_those_that_wait_for_room_are_limited_too(
    parts: tuple[Embedder, MicroBatcher[EmbedRow, Vector], Counting],
) -> None:
    embedder, batcher, tokenizer = parts
    queued = asyncio.create_task(embedder.embed(asked("x" * 90)))
    await until(lambda: batcher.queued_in("bulk"))
    for_ever = 1e9
    # Guessed to have more than 90 tokens each, and 800 may wait.
    waiting = [asyncio.create_task(embedder.embed(asked(letter * 360, for_ever))) for letter in "abcdefgh"]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await embedder.embed(asked("i" * 360, for_ever))
    assert tokenizer.texts == 1
    waiting.pop().cancel()
    await asyncio.sleep(0)
    waiting.append(asyncio.create_task(embedder.embed(asked("j" * 360, for_ever))))  # in the place of the one that left
    computing = asyncio.create_task(batcher.run(plan()))
    results = await asyncio.gather(queued, *waiting)
    assert [result.prompt_tokens for result in results] == [91] + [361] * 8
    computing.cancel()
    await asyncio.wait({computing})
