"""Classification by a linear probe: how well logistic regression finds a text's label from its frozen vector."""

from __future__ import annotations

from pathlib import Path

from sklearn.metrics import accuracy_score, f1_score

from model_store.evaluation.files import DatasetError, read_table, text_field
from model_store.evaluation.probe import sample, tuned_probe
from model_store.evaluation.report import Score
from model_store.evaluation.text_vectors import TextVectors


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """(text, label) from `text` and `label` of JSON lines or a tab-separated file with a header (may be .gz).

    Raises:
        DatasetError: for a line without a text or a label, or a file without lines.
    """
    rows = list(read_table(path))
    if not rows:
        raise DatasetError(f"{path} holds no text")
    return [(text_field(path, number, row, "text"), _label(path, number, row.get("label"))) for number, row in rows]


class Classification:
    """A probe fitted to `limit` texts of one file and tried on another; `instruction` is put before every text."""

    def __init__(self, train: Path, test: Path, instruction: str = "", limit: int | None = None) -> None:
        self._name, self._instruction = f"classification, {test.name}", instruction
        self._train, self._test = sample(read_labelled(train), limit), read_labelled(test)

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        """Accuracy and macro F1 for each setting."""
        train = vectors.embed([text for text, _ in self._train], self._instruction)
        test = vectors.embed([text for text, _ in self._test], self._instruction)
        expected = [label for _, label in self._test]
        scores = []
        for setting in test:
            found = tuned_probe(train[setting], [label for _, label in self._train]).predict(test[setting])
            macro_f1 = float(f1_score(expected, found, average="macro"))
            scores.append(Score(model, self._name, "accuracy", setting, float(accuracy_score(expected, found))))
            scores.append(Score(model, self._name, "macro F1", setting, macro_f1))
        return scores


def _label(path: Path, number: int, value: object) -> str:
    if not isinstance(value, str | int):
        raise DatasetError(f"{path}, line {number}: the label is {value!r}, neither text nor a whole number")
    return str(value)
