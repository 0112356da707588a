"""What `make audit` makes of pip-audit's findings: an audit that checked nothing is no success."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
CLEAN = {"name": "sound", "version": "1.0", "vulns": []}
FLAWED = {"name": "weak", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": []}]}
UNKNOWN = {"name": "elsewhere", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.mark.parametrize(
    ("packages", "offline", "status", "said"),
    [
        ([CLEAN], "", 0, "1 packages checked, 0 known vulnerabilities"),
        ([CLEAN, UNKNOWN], "", 0, "1 packages were NOT CHECKED, as nothing is known of them: elsewhere"),
        ([CLEAN, FLAWED], "", 1, "weak 2.0: PYSEC-1, fixed in 2.1"),
        ([CLEAN, FLAWED], "1", 1, "1 known vulnerabilities"),
        ([UNKNOWN], "", 2, "NOTHING WAS CHECKED"),
        (None, "", 2, "set AUDIT_OFFLINE=1"),
        (None, "1", 0, "NOTHING WAS CHECKED"),
    ],
)
def test_what_was_found(packages: list[Any] | None, offline: str, status: int, said: str, tmp_path: Path) -> None:
    if packages is not None:
        (tmp_path / "audit.json").write_text(json.dumps({"dependencies": packages, "fixes": []}))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "audit.json")]
    ran = subprocess.run(command, env={**os.environ, "AUDIT_OFFLINE": offline}, capture_output=True, text=True)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert said in ran.stdout
