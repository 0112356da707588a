"""What is known so far, kept in a file: figures, targets, errors; and the time that is left."""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from bench.report import machine

_Found = TypeVar("_Found")


class Report:
    """Runs steps and keeps what they find in a file."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.shapes: str = options.shapes
        # Tiny shapes only show that everything runs.
        self.tiny = options.shapes == "tiny"
        self.lacks_cuda = "" if device.type == "cuda" else "CUDA"
        # Operations of large products, and bytes that a copy reads and writes, a second. While they are unknown, shares
        # of them are NaN.
        self.bf16_flops = self.bytes_per_second = math.nan
        self._file = options.out / "gpu.json"
        self._ends: float = time.perf_counter() + options.seconds
        about = {**machine(), "cuda": torch.version.cuda}
        if options.commit:
            about["commit"] = options.commit
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            about |= {"device": properties.name, "device_gb": round(properties.total_memory / 1e9, 1)}
        self.document: dict[str, Any] = {"benchmark": "gpu", "machine": about, "shapes": options.shapes, "running": ""}
        self.targets, self.figures, self.skipped, self.errors = (
            self.document.setdefault(name, {}) for name in ("targets", "figures", "skipped", "errors")
        )

    @property
    def seconds_left(self) -> float:
        """Until the run should end."""
        return self._ends - time.perf_counter()

    def step(self, name: str, needs_seconds: float, run: Callable[[], _Found], lacks: str = "") -> _Found | None:
        """Note what `run` gives and return it, or None if it fails, or lacks something, or its time is over."""
        if not lacks and not self.tiny and needs_seconds > self.seconds_left:
            lacks = f"about {needs_seconds:.0f} s, {self.seconds_left:.0f} are left"
        if lacks:
            self.skipped[name] = f"needs {lacks}"
            print(f"{name}: skipped, needs {lacks}", flush=True)
            self.save()
            return None
        self.document["running"] = name
        self.save()
        began, found = time.perf_counter(), None
        try:
            found = run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # an error of the device belongs to this step
            self.figures[name] = found
        except Exception as error:
            self.errors[name] = "".join(traceback.format_exception(error))[-3000:]
        self.document["running"] = ""
        took = round(time.perf_counter() - began, 1)
        print(f"{name} ({took} s): {self.errors.get(name) or json.dumps(found)}", flush=True)
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # some errors leave a device that refuses everything: each step then says so
                torch.cuda.empty_cache()
        return found

    def target(self, name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """Note a figure beside what it should be."""
        met = value >= at_least if at_least is not None else at_most is not None and value <= at_most
        aim = f">= {at_least}" if at_least is not None else f"<= {at_most}"
        self.targets[name] = {"value": float(f"{value:.3g}"), "target": aim, "met": bool(met)}
        print(f"target {name}: {value:.3g}, {aim}: {'met' if met else 'MISSED'}", flush=True)

    def save(self) -> None:
        """Write the file."""
        self._file.write_text(json.dumps(self.document, indent=1) + "\n")
