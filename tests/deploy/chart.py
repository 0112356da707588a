"""Renders the chart and holds what comes out to published schemas: python tests/deploy/chart.py CHART <asked.json

Not of the project's environment: Helm itself, as a library, and the schemas are in one that `make chart-test` makes.
Reads `values` by the name of their case, and `objects` to hold to the schemas as they are. Writes Helm's lint messages,
by case what the values were refused for, or the objects and what is wrong with them, and the objects' problems.

- Kubernetes' own kinds are held to its OpenAPI schemas, strict, of the first version that will do and of the last.
- ServiceMonitor, PrometheusRule and ScaledObject are held to models made of their CRDs, both ways: types, and that
  nothing is in them that the models don't have.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python  # type: ignore[import-not-found, unused-ignore]
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject  # type: ignore[import-not-found, unused-ignore]
from cloudcoil.models.prometheus_operator.v1 import (  # type: ignore[import-not-found, unused-ignore]
    PrometheusRule,
    ServiceMonitor,
)
from kubernetes_validate import utils as kubernetes  # type: ignore[import-not-found, unused-ignore]

VERSIONS = ("1.30.0", kubernetes.latest_version())
CUSTOM = {"ScaledObject": ScaledObject, "PrometheusRule": PrometheusRule, "ServiceMonitor": ServiceMonitor}


def problems_of(thing: dict[str, Any]) -> list[str]:
    """What schemas say against an object."""
    where = f"{thing['kind']}/{thing['metadata']['name']}"
    if model := CUSTOM.get(thing["kind"]):
        try:
            known = model.model_validate(thing).model_dump(by_alias=True, exclude_none=True, mode="json")
        except ValueError as error:
            return [f"{where}: {error}"]
        return [f"{where}: unknown: {path}" for path in unknown(thing, known)]
    problems = []
    for version in VERSIONS:
        try:
            kubernetes.validate(thing, version, strict=True)
        except kubernetes.ValidationError as error:
            problems.append(f"{where} in {version}: {list(error.absolute_path)}: {error.message}")
    return problems


def unknown(given: Any, known: Any, path: str = "") -> list[str]:
    """Paths of what is in an object and was lost on its way through a model."""
    if isinstance(given, dict):
        if not isinstance(known, dict):
            return [path]
        return [one for name in given for one in unknown(given[name], known.get(name), f"{path}/{name}")]
    if isinstance(given, list):
        if not isinstance(known, list) or len(given) != len(known):
            return [path]
        return [one for n, (a, b) in enumerate(zip(given, known, strict=True)) for one in unknown(a, b, f"{path}/{n}")]
    return [] if known is not None else [path]


def main(folder: str) -> None:
    """See above."""
    asked = json.load(sys.stdin)
    report: dict[str, Any] = {"lint": helm_python.lint(folder), "cases": {}}
    with helm_python.Chart.load(folder) as chart:
        for name, values in asked["values"].items():
            try:
                files = chart.render(values, name="test", namespace="somewhere")
            except helm_python.HelmError as error:
                report["cases"][name] = {"refused": str(error)}
                continue
            rendered = [text for file, text in files.items() if file.endswith(".yaml")]
            objects = [thing for text in rendered for thing in yaml.safe_load_all(text) if thing]
            problems = [problem for thing in objects for problem in problems_of(thing)]
            report["cases"][name] = {"objects": objects, "problems": problems}
    report["problems"] = [problems_of(thing) for thing in asked["objects"]]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
