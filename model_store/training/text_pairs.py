"""Pairs for retrieval from plain texts, without labels: a part of a text, and what it must find.

Three tasks, each with its own instruction: a sentence and the rest of its text (inverse cloze, Lee et al. 2019), two
random crops of a text (Izacard et al. 2022), and a title and its body. No torch here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np

Task = Literal["sentence", "crop", "title"]

INSTRUCTIONS: dict[Task, str] = {
    "sentence": "Given a sentence, retrieve the passage that it belongs to:",
    "crop": "Given a part of a text, retrieve another part of the same text:",
    "title": "Given a title, retrieve the text below it:",
}

# A query of fewer words says too little, as does a passage. A character of Chinese or Japanese counts as a word.
_LEAST_WORDS = {"query": 4, "passage": 8}

# The share of a text that a crop has.
_CROPS = (0.05, 0.5)

_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")

# Up to a mark that ends a sentence and what closes behind it; after a Latin mark with white space behind.
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[」』”’）]*|$)", re.DOTALL)

_Random = np.random.Generator


class TextPairs:
    """Makes pairs; texts that are there already, and queries that would have two answers, are left out.

    Texts and queries that differ in capitals and white space alone are the same. `made` counts the pairs by task, and
    `repeated` what was left out.
    """

    def __init__(
        self, tasks: Sequence[Task], seed: int = 0, instruction: str | None = None, keep_sentence: float = 0.1
    ) -> None:
        """`instruction` is that of all tasks; `keep_sentence` is the chance that a sentence stays in its text."""
        self.made: Counter[Task] = Counter()
        self.repeated = 0
        self._tasks, self._seed, self._instruction, self._keep = tasks, seed, instruction, keep_sentence
        self._seen: set[bytes] = set()

    def of(self, texts: Iterable[tuple[str, str | None]]) -> Iterator[dict[str, str]]:
        """The pairs of (text, title), at most one for each task, as objects that supervised training reads.

        They depend on the seed, and on the place of a text among all of them.
        """
        for place, (text, title) in enumerate(texts):
            if self._is_new("text", text):
                random = np.random.default_rng([self._seed, place])
                for task in self._tasks:
                    yield from self._pair(task, text, title, random)

    def _pair(self, task: Task, text: str, title: str | None, random: _Random) -> Iterator[dict[str, str]]:
        if task == "sentence":
            found = _inverse_cloze(text, self._keep, random)
        elif task == "crop":
            found = _crop(text, random), _crop(text, random)
        else:
            found = (title or "").strip(), text.strip()
        query, positive = found
        least = 1 if task == "title" else _LEAST_WORDS["query"]
        if _words(query) < least or _words(positive) < _LEAST_WORDS["passage"] or _same(query) == _same(positive):
            return
        if self._is_new(task, query):
            self.made[task] += 1
            instruction = INSTRUCTIONS[task] if self._instruction is None else self._instruction
            yield {"query": query, "positive": positive, **({"instruction": instruction} if instruction else {})}

    def _is_new(self, kind: str, text: str) -> bool:
        mark = blake2b(f"{kind} {_same(text)}".encode(), digest_size=16).digest()
        if mark in self._seen:
            self.repeated += 1
            return False
        self._seen.add(mark)
        return True


def _inverse_cloze(text: str, keep: float, random: _Random) -> tuple[str, str]:
    """A sentence, and the text with or without it; ("", "") if the text has only one."""
    sentences = [found.span() for found in _SENTENCE.finditer(text)]
    long = [(start, end) for start, end in sentences if _words(text[start:end]) >= _LEAST_WORDS["query"]]
    if len(sentences) < 2 or not long:
        return "", ""
    start, end = long[random.integers(len(long))]
    if random.random() < keep:
        return text[start:end].strip(), text.strip()
    before, behind = text[:start], text[end:]
    return text[start:end].strip(), f"{before.rstrip()} {behind.lstrip()}".strip()


def _crop(text: str, random: _Random) -> str:
    """Words in a row, of a random share of the text."""
    words = [found.span() for found in _WORD.finditer(text)]
    count = round(len(words) * random.uniform(*_CROPS))
    if not count:
        return ""
    first = random.integers(len(words) - count + 1)
    return text[words[first][0] : words[first + count - 1][1]]


def _words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _same(text: str) -> str:
    return " ".join(text.casefold().split())
