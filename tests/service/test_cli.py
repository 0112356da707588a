"""What the command makes of errors: the user's own in one sentence, faults of the program with their traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli import main


@pytest.mark.parametrize("fault", ['ValueError("bug")', 'OSError("bug")', 'OSError(9, "bug")', 'KeyError("bug")'])
def test_a_fault_deep_inside_keeps_its_traceback(fault: str, tmp_path: Path) -> None:
    """Planted in a package that the command imports."""
    (tmp_path / "transformers.py").write_text(f"raise {fault}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = _command(tmp_path, "plan", "--model", str(tmp_path), "--gpu", "l4")
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert "bug" in found.stderr.splitlines()[-1]


def _command(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(packages), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "absent"], "absent is not a stored encoder: it has no manifest.json"),
        (["build", "--base", "{here}/absent", "--out", "{here}/out"], "is no folder and no hub id"),
        (["build", "--recipe", "absent"], "there is no recipe 'absent'"),
        (["build", "--recipe", "{here}/here.toml/x.toml", "--out", "{here}/out"], "there is no recipe file"),
        (["build", "--base", "demo:", "--out", "{here}/here.toml/out"], "File exists: '{here}/here.toml'"),
        (["serve", "--port", "many"], "LLM2VEC_PORT is 'many': it must be a whole number"),
        (["plan", "--model", "{here}", "--gpu", "l4"], "{here}/config.json is not valid JSON: "),
        (["embed", "{here}/absent.txt", "--out", "{here}/out"], "absent.txt"),
        (["train", "mntp", "{here}/absent.json"], "absent.json can't be read: "),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here.toml").write_text("=")
    (tmp_path / "config.json").write_text("{")
    assert main([argument.format(here=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llm2vec-service: ")
    assert error.count("\n") == 1
    assert told.format(here=tmp_path) in error
