from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_store.evaluation.report import ReportError, Score, check_picture, draw, table, write_json

SCORES = [
    Score("causal", "STS", "Spearman", "mean", 0.5378),
    Score("causal", "STS", "Spearman", "weighted_mean", -0.02),
    Score("bidirectional", "STS", "Spearman", "mean", 0.6597),
    Score("causal", "words", "accuracy", "same_token", 0.9),
]


def test_a_table_has_a_block_for_each_task() -> None:
    assert table(SCORES).splitlines() == [
        "STS: Spearman × 100",
        "                 mean  weighted_mean",
        "causal          53.78          -2.00",
        "bidirectional   65.97              -",
        "",
        "words: accuracy × 100",
        "        same_token",
        "causal       90.00",
    ]


def test_json_holds_every_figure_in_full(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", SCORES, {"stages": "demo", "sts": [Path("dev.tsv")]})
    found = json.loads((tmp_path / "a.json").read_text())
    assert [Score(**score) for score in found["scores"]] == SCORES
    assert found["asked"] == {"stages": "demo", "sts": ["dev.tsv"]}
    assert found["versions"]["numpy"]


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / "a.png", SCORES)
    draw(tmp_path / "a.svg", SCORES)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    check_picture(tmp_path / "a.pdf")
    with pytest.raises(ReportError, match=r"a\.txt is no picture: end its name in \.png, \.svg, \.pdf"):
        check_picture(tmp_path / "a.txt")
