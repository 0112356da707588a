"""The versions that `make lowest` tries are those that pyproject.toml promises."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins(path: str) -> dict[str, Version]:
    """The versions that a file of constraints names, by package."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_each_promise_is_tried_at_its_lowest() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    promised: dict[str, Version] = {}
    for requirement in map(Requirement, dependencies):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement} promises no lowest version"
        promised[canonicalize_name(requirement.name)] = Version(bound.version)
    tried = pins("tests/lowest-constraints.txt")
    # Older ones of torch are held by their schemas: see test_torch_schemas.py.
    assert tried["torch"] == pins("constraints.txt")["torch"]
    assert promised == {name: tried[name] for name in promised} | {"torch": promised["torch"]}
