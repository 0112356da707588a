"""Classification by a linear probe: what can be told of a text from its frozen vector by logistic regression."""

from __future__ import annotations

from pathlib import Path

from model_store.evaluation.files import DatasetError, read_table, text_field
from model_store.evaluation.probe import Probe, accuracy, macro_f1
from model_store.evaluation.report import Score
from model_store.evaluation.text_vectors import TextVectors


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """(texts, labels) from JSON lines or a tab-separated file with a header (may be .gz), of `text` and `label`.

    Raises:
        DatasetError: for a line that lacks one of them, or if there is none.
    """
    rows = list(read_table(path))
    if not rows:
        raise DatasetError(f"{path} holds no text")
    texts = [text_field(path, number, row, "text") for number, row in rows]
    return texts, [_label(path, number, row.get("label")) for number, row in rows]


class Classification:
    """Fitted to one file, tried on another; `instruction` is put before every text."""

    def __init__(self, train: Path, test: Path, instruction: str = "", limit: int | None = None) -> None:
        self._name, self._instruction = f"classification, {test.name}", instruction
        texts, labels = read_labelled(train)
        self._train_texts, self._train_labels = texts[:limit], labels[:limit]
        self._test_texts, self._test_labels = read_labelled(test)

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        """Accuracy and macro F1."""
        train = vectors.embed(self._train_texts, self._instruction)
        test = vectors.embed(self._test_texts, self._instruction)
        scores = []
        for setting in test:
            found = Probe.fit(train[setting], self._train_labels).predict(test[setting])
            for metric, value in (
                ("accuracy", accuracy(self._test_labels, found)),
                ("macro F1", macro_f1(self._test_labels, found)),
            ):
                scores.append(Score(model, self._name, metric, setting, value))
        return scores


def _label(path: Path, number: int, value: object) -> str:
    if not isinstance(value, str | int):
        raise DatasetError(f"{path}, line {number}: the label is {value!r}, neither text nor a whole number")
    return str(value)
