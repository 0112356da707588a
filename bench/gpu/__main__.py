"""What the encoder and the server do on a GPU: right, and how near to what the device can do at most.

    python -m bench.gpu kernels --out DIR      do the fast paths compute what the slow ones do?
    python -m bench.gpu forward --out DIR      time of a batch by its tokens, lone queries, mixed lengths
    python -m bench.gpu serve   --out DIR      the same over HTTP, and queries beside bulk

Each ends within --seconds: what no longer fits is named under "skipped", with the reason. DIR/gpu_PART.json is written
after every step, so that a run that is killed leaves what it had; the same is the last line printed. The exit status
is 1 if a step failed or a check did. `--shapes tiny` tries everything that needs no GPU on the CPU, in a minute.

The weights are random, of real models' shapes, and made on the device. `kernels` and `forward` need torch and
transformers only: where pydantic is missing something empty stands in for `model_store.manifest`, whose classes no
encoder made in memory uses. `serve` needs what pyproject.toml names. For a machine without a network bring along
what it lacks (4 MB), made here, and used there:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform \
        manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt \
        -d WHEELS fastapi starlette opentelemetry-api pydantic pydantic-core pydantic-settings annotated-types \
        annotated-doc typing-extensions typing-inspection python-dotenv uvicorn httptools orjson pybase64
    pip install --no-index --no-deps --target SITE WHEELS/*.whl && export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu import forward, kernels, serve
from bench.gpu.inputs import SHAPES
from bench.gpu.report import Report
from model_store.devices import choose_device

PARTS: dict[str, Callable[[Report], None]] = {
    "kernels": kernels.measure,
    "forward": forward.measure,
    "serve": serve.measure,
}


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--shapes", choices=SHAPES, default="real")
    parser.add_argument("--seconds", type=float, default=480.0, help="end by then (default %(default)s)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git history to ask")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = choose_device("auto" if options.shapes == "real" else "cpu")
    if options.shapes == "real" and device.type != "cuda":
        parser.error("real shapes need a GPU: try --shapes tiny")
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny shapes only lose time to more
    report = Report(options.part, options, device)
    PARTS[options.part](report)
    print(json.dumps(report.document))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
