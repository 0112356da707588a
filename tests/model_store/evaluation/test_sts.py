from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from model_store.evaluation.files import DatasetError
from model_store.evaluation.sts import evaluate_sts, read_pairs

HEADER = "genre\tscore\tsentence1\tsentence2\n"


def test_reads_plain_and_gzipped_files_without_quoting(tmp_path: Path) -> None:
    content = HEADER + 'news\t4.5\tHe said "no.\tShe said "yes.\n' + "news\t1\ta\tb\n"
    (tmp_path / "a.tsv").write_text(content)
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.tsv", "a.tsv.gz"):
        pairs = read_pairs(tmp_path / name)
        assert [(pair.first, pair.second, pair.score) for pair in pairs] == [
            ('He said "no.', 'She said "yes.', 4.5),
            ("a", "b", 1.0),
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("score\tsentence1\n1\ta\n", "line 2: there is no text 'sentence2', only score, sentence1"),
        (HEADER + "news\tmuch\ta\tb\n", "line 2: score is 'much', not a number"),
        (HEADER + "news\tnan\ta\tb\n", "line 2: score is 'nan', not a number"),
        (HEADER + "news\tinf\ta\tb\n", "line 2: score is 'inf', not a number"),
        (HEADER + "news\t1\ta\n", "line 2: 3 columns, the header has 4"),
        (HEADER + "news\t1\ta\tb\n" * 3, "of different scores"),
        (HEADER + "news\t1\ta\tb\n", "at least two"),
    ],
)
def test_a_bad_file_names_the_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_pairs(tmp_path / "bad.tsv")
    with pytest.raises(DatasetError, match="can't be read"):
        read_pairs(tmp_path / "absent.tsv")


def test_spearman_is_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(HEADER + "".join(f"n\t{score}\ta\tb\n" for score in (5, 3, 1)))
    pairs = read_pairs(tmp_path / "a.tsv")
    cosines = np.array([0.99, 0.2, 0.1], dtype=np.float32)
    vectors = np.array([[1, 0], [0, 0]] * 3, dtype=np.float32)
    vectors[1::2, 0], vectors[1::2, 1] = cosines, np.sqrt(1 - cosines**2)
    assert evaluate_sts(pairs, vectors) == pytest.approx(1.0)
    assert evaluate_sts(pairs[::-1], vectors) == pytest.approx(-1.0)
