"""Word-level probes: a linear layer finds part of speech, chunks and entities from frozen token vectors.

A word's vector is the mean over its tokens. Under `next_token` it is the mean one position earlier, since MNTP makes
position i − 1 predict token i (BehnamGhader et al. 2024, section 4.1; the names are those of the official script, which
uses `same_token` before MNTP and `next_token` after it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score

from model_store.evaluation.classification import sample, tuned_probe
from model_store.evaluation.files import DatasetError, read_lines
from model_store.evaluation.report import Score

# By the number of columns: the column of the word, and that of each layer of tags.
_LAYOUTS = {
    2: (0, {"tag": 1}),
    3: (0, {"part of speech": 1, "chunk": 2}),  # CoNLL-2000
    4: (0, {"part of speech": 1, "chunk": 2, "entity": 3}),  # CoNLL-2003
    5: (1, {"entity": 2}),  # Universal NER
    10: (1, {"part of speech": 3}),  # CoNLL-U
}


@dataclass(frozen=True)
class TaggedSentence:
    """A sentence's words, and in each layer of tags one tag for every word."""

    words: tuple[str, ...]
    tags: dict[str, tuple[str, ...]]


class WordVectors(Protocol):
    """(words, D) vectors of the words of all sentences, end to end, for each setting."""

    def embed_words(self, sentences: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float32]]: ...


def read_conll(path: Path) -> list[TaggedSentence]:
    """Sentences from a file in columns (may be .gz), with an empty line after each sentence.

    The number of columns tells their meaning: 2 word, tag · 3 word, part of speech, chunk (CoNLL-2000) · 4 the same
    with entity (CoNLL-2003) · 5 number, word, entity (Universal NER) · 10 CoNLL-U, of which the universal part of
    speech is read. Columns end at tabs if the line has a tab, else at white space.

    Raises:
        DatasetError: for a line with another number of columns than the first, or a file without sentences.
    """
    sentences: list[TaggedSentence] = []
    columns = 0
    rows: list[list[str]] = []
    for number, line in enumerate([*read_lines(path), ""], 1):
        if not line.strip():
            if rows and rows[0][0] != "-DOCSTART-":
                sentences.append(_sentence(rows))
            rows = []
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        # If words are numbered, a # begins a comment; otherwise it can be a word.
        if line.startswith("#" if columns in (5, 10) else "# ") and columns in (0, 5, 10):
            continue
        columns = columns or len(cells)
        if len(cells) != columns or columns not in _LAYOUTS:
            raise DatasetError(f"{path}, line {number}: {len(cells)} columns, not {_expected(columns)}")
        # CoNLL-U gives a word of the text that was split a number such as 3-4, and a word that is not in the text 3.1.
        if columns == 10 and not cells[0].isdigit():
            continue
        rows.append(cells)
    if not sentences:
        raise DatasetError(f"{path} holds no sentence")
    return sentences


class Words:
    """Linear probes for every layer of tags, fitted to `limit` sentences of one file and tried on another."""

    def __init__(self, train: Path, test: Path, limit: int | None = None) -> None:
        self._name = f"words, {test.name}"
        self._train, self._test = sample(read_conll(train), limit), read_conll(test)
        if self._train[0].tags.keys() != self._test[0].tags.keys():
            raise DatasetError(
                f"{train} has {', '.join(self._train[0].tags)}, but {test} has {', '.join(self._test[0].tags)}"
            )

    def evaluate(self, model: str, vectors: WordVectors) -> list[Score]:
        """Accuracy for each layer and setting, and F1 of whole spans if the tags are B-, I- and O."""
        train = vectors.embed_words([sentence.words for sentence in self._train])
        test = vectors.embed_words([sentence.words for sentence in self._test])
        scores = []
        for layer in self._test[0].tags:
            expected = [sentence.tags[layer] for sentence in self._test]
            for setting in test:
                probe = tuned_probe(train[setting], [tag for sentence in self._train for tag in sentence.tags[layer]])
                answers = probe.predict(test[setting]).tolist()
                following = iter(answers)
                found = [tuple(islice(following, len(tags))) for tags in expected]
                task = f"{self._name}, {layer}"
                right = float(accuracy_score([tag for tags in expected for tag in tags], answers))
                scores.append(Score(model, task, "accuracy", setting, right))
                if all(tag == "O" or tag[:2] in ("B-", "I-") for tags in expected for tag in tags):
                    scores.append(Score(model, task, "span F1", setting, span_f1(expected, found)))
        return scores


def span_f1(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 of whole spans of B-, I- and O tags within sentences. A span counts if its type and both ends are right.

    Tags are read as by CoNLL's `conlleval` (Tjong Kim Sang and Buchholz 2000): I- after O or another type also begins a
    span.
    """
    wanted = {(number, *span) for number, tags in enumerate(expected) for span in _spans(tags)}
    given = {(number, *span) for number, tags in enumerate(found) for span in _spans(tags)}
    return 2 * len(wanted & given) / (len(wanted) + len(given)) if wanted or given else 1.0


def _spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, word after the last) of each span."""
    begun = 0
    kind = ""
    for place, tag in enumerate([*tags, "O"]):
        part, _, name = tag.partition("-")
        if kind and (part != "I" or name != kind):
            yield kind, begun, place
            kind = ""
        if part != "O" and not kind:
            begun, kind = place, name


def _sentence(rows: list[list[str]]) -> TaggedSentence:
    word, layers = _LAYOUTS[len(rows[0])]
    tags = {name: tuple(row[column] for row in rows) for name, column in layers.items()}
    return TaggedSentence(tuple(row[word] for row in rows), tags)


def _expected(columns: int) -> str:
    return f"{columns} as before" if columns in _LAYOUTS else f"one of {', '.join(map(str, _LAYOUTS))}"
