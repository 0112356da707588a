"""Progress where stderr is no terminal."""

from __future__ import annotations

import time

import pytest

from model_store.build import progress
from model_store.build.progress import Lines


def test_a_line_at_the_beginning_and_one_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    bar = Lines(total=1000, desc="building", unit="B", unit_scale=True)
    for _ in range(1000):
        bar.update(1)
    bar.close()
    bar.close()
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("building:   0%")
    assert last.startswith("building: 100%")
    assert "1.00k/1.00k" in last


def test_lines_between_are_as_far_apart_as_they_should_be(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    bar = Lines(total=3, mininterval=0.0, miniters=1)
    for _ in range(3):
        bar.update(1)
        time.sleep(0.01)
    bar.close()
    lines = capfd.readouterr().err.splitlines()
    assert list(dict.fromkeys(line.partition("%")[0].strip() for line in lines)) == ["0", "33", "67", "100"]
