from __future__ import annotations

from pathlib import Path

import pytest

from model_store.evaluation.classification import Classification, read_labelled
from model_store.evaluation.files import DatasetError
from tests.model_store.evaluation.vectors import HashedVectors

TRAIN = "text\tlabel\nthe good mill\tyes\na good river\tyes\nthe bad mill\tno\na bad river\tno\n"


def test_reads_labels_as_text_or_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n')
    assert read_labelled(tmp_path / "a.jsonl") == [("a", "1"), ("b", "1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1.5}\n', r"line 1: the label is 1\.5"),
        ('{"text": "a"}\n', "line 1: the label is None"),
        ('{"label": "a"}\n', "line 1: there is no text 'text'"),
        ("", "holds no text"),
    ],
)
def test_a_bad_file_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_labelled(tmp_path / "a.jsonl")


def test_a_probe_of_text_vectors(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(TRAIN)
    (tmp_path / "test.tsv").write_text("text\tlabel\na good mill\tyes\na bad mill\tno\na bad mill\tnone of these\n")
    vectors = HashedVectors()
    scores = Classification(tmp_path / "train.tsv", tmp_path / "test.tsv", "Say:").evaluate("m", vectors)
    assert [score.metric for score in scores] == ["accuracy", "macro F1"]
    assert [score.value for score in scores] == pytest.approx([2 / 3, (1 + 2 / 3 + 0) / 3])
    assert {instruction for _, instruction, _ in vectors.asked} == {"Say:"}
