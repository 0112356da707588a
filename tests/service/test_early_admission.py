"""A request that finds no room is refused before its texts are tokenized."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from model_store.tokenizer import TokenizedText
from service.batcher import MicroBatcher
from service.embedder import Embedder, EmbedInput, EmbedRequest
from service.errors import Overloaded
from service.metrics import Metrics
from service.rows import EmbedRow, Vector
from service.settings import Limits, Settings
from tests.service.fakes import FakeTokenizer, FakeWorker, fake_manifest, until


class Counting(FakeTokenizer):
    """Counts the texts that it is given."""

    texts = 0

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        self.texts += len(texts)
        return super().encode_batch(texts, instructions)


async def test_what_finds_no_room_is_not_tokenized() -> None:
    worker, metrics, settings, manifest = FakeWorker(), Metrics(), Settings(max_queued_tokens=100), fake_manifest()
    batcher: MicroBatcher[EmbedRow, Vector] = MicroBatcher(worker.run_batch, metrics, None, 100)
    tokenizer = Counting()
    embedder = Embedder(manifest, tokenizer, batcher, settings, Limits(settings, manifest, "cpu"), metrics)

    def asked(text: str) -> EmbedRequest:
        return EmbedRequest([EmbedInput(text)], lane="bulk")

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
    embedder.close()
