"""The dashboard: its shape as Grafana publishes it, and that it asks for series that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from service.metrics import Metrics
from tests.deploy.monitoring import ROOT, dashboard, queries, rules

# `make monitoring-test` installs them.
TYPES = ROOT / "build" / "grafana-types"


def declared() -> set[str]:
    """The names of all series of a server."""
    kinds = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {f"{metric.name}{end}" for metric in Metrics().registry.collect() for end in kinds[metric.type]}


def test_every_series_asked_for_is_declared() -> None:
    asked = [query.expr for query in queries()] + [rule["expr"] for rule in rules()]
    named = {name for expr in asked for name in re.findall(r"\bllm2vec_\w+", expr)}
    assert len(named) > 30
    assert named <= declared()


def test_every_query_is_of_the_servers_chosen() -> None:
    for query in queries():
        for selector in re.findall(r"llm2vec_\w+({[^}]*)?", query.expr):
            assert selector.startswith('{job=~"$job",instance=~"$instance"'), query


def test_panels_have_their_own_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"], (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


# A literal, and the type in grafana.ts that it should have.
Part = tuple[str, dict[str, Any]]


def parts(content: dict[str, Any]) -> list[Part]:
    """A dashboard's panels, and what is around them."""
    around = {name: value for name, value in content.items() if name != "panels"}
    return [("Around", around), *((f"{panel['type'].capitalize()}Panel", panel) for panel in content["panels"])]


def complaints(given: list[Part], folder: Path) -> dict[int, str]:
    """What TypeScript says of literals of Grafana's types, by their number."""
    lines = [f"export const part{number}: {kind} = {json.dumps(value)};" for number, (kind, value) in enumerate(given)]
    kinds = ", ".join({kind for kind, _ in given})
    lines.append(f'import type {{ {kinds} }} from "./grafana";')
    (folder / "dashboard.ts").write_text("\n".join(lines))
    shutil.copy(Path(__file__).with_name("grafana.ts"), folder)
    (folder / "node_modules").symlink_to(TYPES / "node_modules")
    compiler = [str(TYPES / "node_modules" / "typescript" / "bin" / "tsc"), "--noEmit", "--strict", "--skipLibCheck"]
    modules = ["--target", "esnext", "--module", "esnext", "--moduleResolution", "bundler"]
    done = subprocess.run(["node", *compiler, *modules, "dashboard.ts"], cwd=folder, capture_output=True, text=True)
    said = re.findall(r"^dashboard\.ts\((\d+),\d+\): (.*)", done.stdout, re.MULTILINE)
    assert bool(said) == (done.returncode != 0), done.stdout + done.stderr
    return {int(line) - 1: text for line, text in said}


def spoiled(kind: str, spoil: Callable[[dict[str, Any]], object]) -> Part:
    """The first part of that type, spoiled."""
    value = next(value for of, value in parts(dashboard()) if of == kind)
    spoil(value)
    return kind, value


WRONG = [
    spoiled("TimeseriesPanel", lambda panel: panel["options"]["legend"].update(displayMode="lst")),
    spoiled("TimeseriesPanel", lambda panel: panel["fieldConfig"]["defaults"]["custom"].update(spanNull=True)),
    spoiled("TimeseriesPanel", lambda panel: panel["targets"][0].update(instant=0)),
    spoiled("StatPanel", lambda panel: panel["options"].pop("reduceOptions")),
    spoiled("StatPanel", lambda panel: panel["targets"][0].pop("expr")),
    spoiled("TablePanel", lambda panel: panel["targets"][0].update(format="tabular")),
    spoiled("RowPanel", lambda panel: panel.update(gridPos=[0, 0])),
    spoiled("Around", lambda around: around.update(graphTooltip=7)),
    spoiled("Around", lambda around: around.update(panel=[])),
]


@pytest.mark.timeout(600)
@pytest.mark.skipif(not TYPES.exists(), reason="Grafana's types are not installed: make monitoring-test does that")
def test_it_has_the_shape_that_grafana_publishes(tmp_path: Path) -> None:
    right = parts(dashboard())
    found = complaints([*right, *WRONG], tmp_path)
    assert {number: text for number, text in found.items() if number < len(right)} == {}
    assert set(found) == set(range(len(right), len(right) + len(WRONG)))
