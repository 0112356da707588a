"""A request that finds no room is refused before its texts are tokenized, or waits where few others do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from model_store.tokenizer import TokenizedText
from service.batcher import MicroBatcher
from service.embedder import Embedder, EmbedInput, EmbedRequest
from service.errors import Overloaded
from service.metrics import Metrics
from service.rows import EmbedRow, Vector
from service.settings import Limits, Settings
from tests.service.fakes import FakeTokenizer, FakeWorker, fake_manifest, until
from tests.service.test_batcher import plan


class Counting(FakeTokenizer):
    """Counts the texts that it is given."""

    texts = 0

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        self.texts += len(texts)
        return super().encode_batch(texts, instructions)


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
