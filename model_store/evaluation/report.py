"""The vectors that a task takes and the scores that it gives: as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.errors import UserError
from model_store.manifest import Role
from model_store.text.prompts import EncoderPrompts

_PICTURES = (".png", ".svg", ".pdf")


class ReportError(UserError):
    """A report that can't be written."""


class TextVectors(Protocol):
    """(n, D) normalised vectors in the texts' order, for each setting that is compared.

    Without an instruction, texts get the encoder's own for their role, or its default prompt; "" is none for certain.
    """

    @property
    def prompts(self) -> EncoderPrompts: ...

    def embed(
        self, texts: Sequence[str], instruction: str | None = None, role: Role | None = None
    ) -> dict[str, NDArray[np.float32]]: ...


@dataclass(frozen=True)
class Score:
    """One figure: the `value`, from −1 or 0 to 1, of a `model` in a `task`, by a `metric`, under a `setting`.

    A setting is one of several ways to use the same model: a pooling, or the tokens that stand for a word.
    """

    model: str
    task: str
    metric: str
    setting: str
    value: float


def table(scores: Sequence[Score]) -> str:
    """A block for each task and metric, with a line for each model and a column for each setting; values × 100."""
    blocks = []
    for (task, metric), some in _by_task(scores).items():
        models, settings = _names(some)
        values = {(score.model, score.setting): f"{100 * score.value:.2f}" for score in some}
        left = max(map(len, models))
        widths = {setting: max(len(setting), 6) for setting in settings}
        lines = [f"{task}: {metric} × 100"]
        lines.append(" " * left + "".join(f"  {setting:>{widths[setting]}}" for setting in settings))
        for model in models:
            cells = (f"  {values.get((model, setting), '-'):>{widths[setting]}}" for setting in settings)
            lines.append(f"{model:{left}}{''.join(cells)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_json(path: Path, scores: Sequence[Score], asked: dict[str, Any]) -> None:
    """Write the scores, the options `asked`, and the versions of the packages that computed the scores."""
    versions = {name: _version(name) for name in ("llm2vec-service", "torch", "transformers", "numpy", "scipy")}
    document = {"asked": asked, "versions": versions, "scores": [asdict(score) for score in scores]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")


def check_picture(path: Path) -> None:
    """Check that `draw` can write to the path, before anything is computed.

    Raises:
        ReportError: if matplotlib is not installed, or the name's ending is no kind of picture.
    """
    if find_spec("matplotlib") is None:
        raise ReportError("a picture needs matplotlib: pip install 'llm2vec-service[eval]'")
    if path.suffix not in _PICTURES:
        raise ReportError(f"{path.name} is no picture: end its name in {', '.join(_PICTURES)}")


def draw(path: Path, scores: Sequence[Score]) -> None:
    """Draw a panel for each task and metric, with a bar for each figure."""
    from matplotlib.figure import Figure

    panels = _by_task(scores)
    rows = max(len(_names(some)[0]) for some in panels.values())
    bars = max(len(_names(some)[0]) * len(_names(some)[1]) for some in panels.values())
    height = 1.2 + 0.22 * bars + 0.15 * rows
    figure = Figure(figsize=(8, height * len(panels)), layout="constrained")
    column = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, ((task, metric), some) in zip(column, panels.items(), strict=True):
        models, settings = _names(some)
        thick = 0.8 / len(settings)
        for number, setting in enumerate(settings):
            found = {score.model: 100 * score.value for score in some if score.setting == setting}
            places = [models.index(model) + (number - (len(settings) - 1) / 2) * thick for model in found]
            drawn = axes.barh(places, list(found.values()), thick * 0.92, label=setting)
            axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
        axes.set_yticks(range(len(models)), models)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"{metric} × 100")
        axes.spines[["top", "right"]].set_visible(False)
        if len(settings) > 1:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=150)


def _by_task(scores: Iterable[Score]) -> dict[tuple[str, str], list[Score]]:
    found: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        found.setdefault((score.task, score.metric), []).append(score)
    return found


def _names(scores: Sequence[Score]) -> tuple[list[str], list[str]]:
    """Models and settings, each once, in the order of the scores."""
    return list(dict.fromkeys(score.model for score in scores)), list(dict.fromkeys(score.setting for score in scores))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
