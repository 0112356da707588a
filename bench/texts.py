"""The texts that benchmarks embed: the same for everybody who is measured."""

from __future__ import annotations

import random
import re
from pathlib import Path

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
