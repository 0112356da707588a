"""What is known so far, kept in a file; the checks, and the time that is left."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from bench.report import machine

TARGETS = {
    "8B": {"of_ceiling_at_8192": ">= 0.70", "lone_to_floor": "<= 1.3"},
    "1.3B": {"tokens_per_second": ">= 190000", "lone_p50_ms": "<= 2"},
    "mixed": {"ours / padded, sorted": ">= 2.5"},
    "serve": {"http / engine": ">= 0.95"},
}


class Report:
    """What is known so far, kept in a file; and the time that is left."""

    def __init__(self, part: str, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.shapes: str = options.shapes
        self.compile: bool = device.type == "cuda" if options.compile is None else options.compile
        self._file = options.out / f"gpu_{part}.json"
        self._ends = time.perf_counter() + options.seconds
        self.checks: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self._head = {"benchmark": f"gpu_{part}", "machine": about(device, options.commit), "shapes": options.shapes}
        self.save()

    def step(self, name: str, needs_seconds: float, run: Callable[[], Any], lacks: str = "") -> Any:
        """The figures that `run` gives, or None if it fails, or lacks something, or its time is over."""
        began = time.perf_counter()
        left = self._ends - began
        if not lacks and self.shapes == "real" and needs_seconds > left:
            lacks = f"about {needs_seconds:.0f} s, {left:.0f} are left"
        if lacks:
            self.skipped[name] = f"needs {lacks}"
            print(f"{name}: skipped, needs {lacks}", flush=True)
            self.save()
            return None
        found = None
        try:
            found = self.figures[name] = run()
        except Exception as error:
            self.errors[name] = "".join(traceback.format_exception(error))[-3000:]
        took = round(time.perf_counter() - began, 1)
        print(f"{name} ({took} s): {self.errors.get(name) or json.dumps(found)}", flush=True)
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def check(self, name: str, value: float, limit: float) -> None:
        """Note whether a difference is small enough; NaN is not."""
        self.checks[name] = {"value": float(f"{value:.3g}"), "limit": limit, "ok": bool(value <= limit)}
        if not value <= limit:
            print(f"CHECK FAILED {name}: {value:.3g} > {limit}", flush=True)

    def needs_cuda(self, compiler: bool = False) -> str:
        """What is lacking for a step."""
        on_cuda = "" if self.device.type == "cuda" else "CUDA"
        return ("" if self.compile else "--compile") if compiler else on_cuda

    @property
    def document(self) -> dict[str, Any]:
        """All of it."""
        kept = {name: getattr(self, name) for name in ("checks", "figures", "skipped", "errors")}
        return {**self._head, "targets": TARGETS, **kept}

    def save(self) -> None:
        """Write it."""
        self._file.write_text(json.dumps(self.document, indent=1) + "\n")

    @property
    def failed(self) -> bool:
        """Whether anything did."""
        return bool(self.errors) or not all(check["ok"] for check in self.checks.values())


def about(device: torch.device, commit: str) -> dict[str, Any]:
    """The machine and its device; the commit as given, where the files come without their history."""
    try:
        found = machine()
    except OSError:  # no git
        found = {"versions": {"torch": torch.__version__}}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_gb": round(properties.total_memory / 1e9, 1)}
    return {**found, "cuda": torch.version.cuda, **({"commit": commit} if commit else {})}
