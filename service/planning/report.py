"""A plan's questions and answers as text: the command's options in, a table or JSON out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import fill
from typing import Any

from service.planning.gpus import PlanError
from service.planning.plan import Asked, Bulk, Plan, Serving

_COLUMNS = 100

# Options of the command that are fields of `Asked` under the same name.
_PASSED_ON = ("quantization", "efficiency", "token_budget", "batch_seconds", "dimensions", "price")

_SECONDS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """A duration such as 50ms, 90s, 30m, 24h or 7d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if not found or not float(found[1]):
        raise PlanError(f"{text!r} is no duration: write 50ms, 90s, 30m, 24h or 7d")
    return float(found[1]) * _SECONDS[found[2]]


def asked_of(options: Mapping[str, Any]) -> Asked:
    """The question that the command's options ask.

    Raises:
        PlanError: for a load that is given only in part, or a number that is impossible.
    """
    texts, tokens, per_second = (options[name] for name in ("texts", "tokens_per_text", "queries_per_second"))
    if (texts is None) != (tokens is None):
        raise PlanError("a bulk job is --texts N and --tokens-per-text N")
    for name, given in options.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise PlanError(f"--{name.replace('_', '-')} is {value:g}: give a number above 0")
    if (options["efficiency"] or 0) > 1:
        raise PlanError("--efficiency is a share of the GPU's peak, such as 0.5")
    timed = options["timed"]
    return Asked(
        bulk=None if texts is None else Bulk(texts, tokens, seconds_of(options["within"])),
        serving=None
        if per_second is None
        else Serving(per_second, options["query_tokens"], seconds_of(options["p99"])),
        timed=timed and (timed[0], timed[1] / 1000),
        **{name: options[name] for name in _PASSED_ON},
    )


def as_json(model: str, plans: list[Plan]) -> dict[str, Any]:
    """For each GPU its figures, with their units and bases, and the assumptions."""
    return {
        "model": model,
        "gpus": {
            plan.gpu.key: {
                "arithmetic": plan.arithmetic,
                "figures": {
                    figure.name: {"value": figure.value, "unit": figure.unit, "basis": figure.basis}
                    for figure in plan.figures()
                },
                "assumptions": plan.assumptions(),
            }
            for plan in plans
        },
    }


def as_table(model: str, plans: list[Plan]) -> str:
    """A line for each figure, with a column for each GPU and the basis at the end; then the assumptions."""
    columns = [plan.figures() for plan in plans]
    rows = [["", *(plan.gpu.key for plan in plans), ""], ["arithmetic", *(plan.arithmetic for plan in plans), ""]]
    rows += [
        [figures[0].name.replace("_", " "), *(figure.text for figure in figures), figures[0].basis]
        for figures in zip(*columns, strict=True)
    ]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [f"{model}, texts of {plans[0].asked.text_tokens} tokens"]
    for name, *values, basis in rows:
        cells = (f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=False))
        lines.append("  ".join((f"{name:{widths[0]}}", *cells, basis)).rstrip())
    notes = dict.fromkeys(note for plan in plans for note in plan.assumptions())
    return "\n".join((*lines, "", *(fill(note, _COLUMNS, subsequent_indent="  ") for note in notes)))
