"""What pip-audit found, from its JSON: python .ci/audit.py audit.json

Exits with 1 for known vulnerabilities, and with 2 where nothing was checked: pip-audit itself calls it a success if it
can find none of the packages. AUDIT_OFFLINE=1 is for where that can't be helped.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(path: Path) -> int:
    """Report; the exit status."""
    packages = json.loads(path.read_text())["dependencies"] if path.is_file() else []
    checked = [package for package in packages if "vulns" in package]
    left_out = [package["name"] for package in packages if "vulns" not in package]
    found = [line for package in checked for line in _lines(package)]
    print(*found, sep="\n", end="\n" * bool(found))
    if left_out:
        print(f"audit: {len(left_out)} packages were NOT CHECKED, as nothing is known of them: {', '.join(left_out)}")
    if not checked:
        offline = os.environ.get("AUDIT_OFFLINE") == "1"
        way_out = "as AUDIT_OFFLINE=1 allows" if offline else "run it with a network, or set AUDIT_OFFLINE=1"
        print(f"audit: NOTHING WAS CHECKED, no advisories could be had: {way_out}")
        return 0 if offline else 2
    print(f"audit: {len(checked)} packages checked, {len(found)} known vulnerabilities")
    return 1 if found else 0


def _lines(package: dict[str, Any]) -> list[str]:
    return [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'nothing'}"
        for flaw in package["vulns"]
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
