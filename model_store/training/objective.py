"""What a contrastive stage minimises, by the names of a configuration. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Distillation = Literal["DistillKLDivLoss", "MarginMSELoss", "EmbedDistillLoss"]


@dataclass(frozen=True)
class Objective:
    """InfoNCE over cosines · `scale`, a distillation loss, or both, at each of `widths`: (width, weight), or the whole.

    The student's and the teacher's scores are divided by their temperatures.
    """

    scale: float
    absolute_margin: float | None = None
    relative_margin: float | None = None
    widths: tuple[tuple[int, float], ...] = ()
    distillation: Distillation | None = None
    contrastive_weight: float = 1.0
    distillation_weight: float = 1.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
