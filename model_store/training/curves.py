"""A run's log as a picture: the logged figures over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Entries of the Trainer's log that are not drawn, such as its timings.
_NOT_DRAWN = ("epoch", "step", "runtime", "samples_per_second", "steps_per_second", "total_flos", "train_loss")


def draw_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each figure in the Trainer's `log_history`. A training figure and its eval_ figure share one."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in log:
        for name, value in entry.items():
            short = name.removeprefix("eval_")
            if short in _NOT_DRAWN or name.startswith("train_") or not isinstance(value, int | float):
                continue
            series.setdefault(short, {}).setdefault(name, []).append((entry["step"], value))
    if not series:
        return
    figure = Figure(figsize=(6 * min(len(series), 2), 3.2 * -(-len(series) // 2)), layout="constrained")
    for number, (short, lines) in enumerate(series.items(), 1):
        axes = figure.add_subplot(-(-len(series) // 2), min(len(series), 2), number)
        for name, points in lines.items():
            label = "held out" if name.startswith("eval_") else "training"
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "", linewidth=1.2)
        axes.set(title=short.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
