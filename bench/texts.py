"""The texts that benchmarks embed, the same for everybody who is measured, and their rows of tokens in batches."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from model_store.text.tokenizer import TextTokenizer, TokenizedText

_ADDRESSES = Path(__file__).parent / "data" / "addresses.txt"


def sentences() -> list[str]:
    """About 600 English sentences."""
    return [
        sentence
        for paragraph in _ADDRESSES.read_text().splitlines()
        for sentence in re.split(r"(?<=[.;:?!]) ", paragraph)
        if len(sentence) > 20
    ]


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """70 % single sentences and 30 % passages of 5 to 20, in random order: a day's mix of queries and passages."""
    generator = random.Random(seed)
    pool = sentences()
    return [
        generator.choice(pool)
        if generator.random() < 0.7
        else " ".join(generator.choice(pool) for _ in range(generator.randint(5, 20)))
        for _ in range(count)
    ]


def distinct_texts(count: int) -> list[str]:
    """Queries of 9 to 15 words as they follow each other in real sentences, no two alike."""
    generator = random.Random(0)
    words = " ".join(sentences()).split()
    found: dict[str, None] = {}
    while len(found) < count:
        start = generator.randrange(len(words) - 15)
        found[" ".join(words[start : start + generator.randint(9, 15)])] = None
    return list(found)


def tokenized(texts: Sequence[str], folder: Path) -> list[TokenizedText]:
    """The rows of texts, without an instruction, for the encoder stored in a folder."""
    return _tokenizer_of(folder).encode_batch(texts, [""] * len(texts))


@cache
def _tokenizer_of(folder: Path) -> TextTokenizer:
    from model_store.manifest import read_manifest  # pydantic, which forward passes on a GPU do without

    return TextTokenizer.load(folder, read_manifest(folder))


def packed_batches(rows: Sequence[TokenizedText], tokens: int) -> list[list[TokenizedText]]:
    """Batches of rows in their order, as full as so many tokens allow."""
    batches: list[list[TokenizedText]] = [[]]
    for row in rows:
        if batches[-1] and sum(map(len, batches[-1])) + len(row) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
