"""The known kinds of GPU, by their data sheets (gpus.toml)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from model_store.errors import UserError
from model_store.shape import Arithmetic


class PlanError(UserError):
    """A plan that can't be made as asked for; the message names the way out."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU by its data sheet: `memory` in bytes, `bandwidth` in bytes a second, dense `peaks` in FLOP/s."""

    key: str
    name: str
    memory: float
    bandwidth: float
    peaks: Mapping[str, float]
    source: str

    def arithmetic(self, quantization: Literal["none", "fp8"]) -> Arithmetic:
        """The arithmetic that the server would multiply in."""
        if quantization == "fp8":
            if "fp8" not in self.peaks:
                have = ", ".join(gpu.key for gpu in gpus().values() if "fp8" in gpu.peaks)
                raise PlanError(f"{self.name} has no fp8, which {have} have: leave out --quantization")
            return "fp8"
        return "bfloat16" if "bfloat16" in self.peaks else "float32"


def gpus() -> dict[str, Gpu]:
    table = tomllib.loads((files("service.planning") / "gpus.toml").read_text())
    return {
        key: Gpu(
            key,
            row["name"],
            row["memory_gb"] * 1e9,
            row["bandwidth_gb"] * 1e9,
            {kind: peak * 1e12 for kind, peak in row["tflops"].items()},
            row["source"],
        )
        for key, row in table.items()
    }


def gpu_named(key: str) -> Gpu:
    known = gpus()
    if key.lower() not in known:
        raise PlanError(f"no GPU {key!r} is known: use one of {', '.join(known)}")
    return known[key.lower()]
