"""What the encoder and the server do on a GPU: whether it is right, and how near it comes to what the device can do.

    python -m bench.gpu --out DIR [--seconds 520] [--save]

One call of at most nine minutes takes these steps in their order:

1. the worker starts from a stored folder, with compiled layers and graphs demanded, and agrees with the CPU;
2. the fast paths compute what the slow ones do;
3. what the device can do at most;
4. 8B: batches by their tokens with and without graphs, a lone query, kernels by their time;
5. 1.3B: the same, a text alone and among others, one long text;
6. 270M: batches by their tokens, pooling alone;
7. the server with 1.3B: bulk, queries, queries beside bulk;
8. what time is left for: 8B with unmerged projections, 8B in fp8, padded batches sorted by length.

DIR/gpu.json is written after every step, so that a run that is killed leaves the figures that it had, and the last line
printed is the same document. A step that no longer fits into --seconds, or lacks something, is named under "skipped"
with the reason. A step that fails is named under "errors", and the run goes on. The exit status is 1 if a step or a
check failed; a missed target fails nothing. `--shapes tiny` tries all that the device allows in about a minute.

The weights are random, of real models' shapes, and made on the device. Steps 2 to 6 and 8 need torch and transformers
alone, step 1 needs pydantic and more, step 7 what pyproject.toml names. For a machine without a network, download the
wheels that it lacks (9 MB) elsewhere, and install them there:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform \
        manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt \
        -d WHEELS pydantic pydantic-core pydantic-settings annotated-types typing-extensions typing-inspection \
        python-dotenv prometheus-client orjson fastapi starlette opentelemetry-api annotated-doc uvicorn httptools \
        pybase64 uvloop
    pip install --no-index --no-deps --target SITE WHEELS/*.whl && export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--shapes", choices=("real", "tiny"), default="real")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=520.0, help="end by then (default %(default)s)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git history to ask")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/ too")
    options = parser.parse_args()

    # The processes of HTTP clients import this module too, and can do without torch.
    import torch

    from bench.gpu import checks, forward, serve, start
    from bench.gpu.ceilings import ceilings
    from bench.gpu.report import Report
    from model_store.encoder.devices import choose_device

    device = choose_device(options.device)
    if options.shapes == "real" and device.type != "cuda":
        parser.error("real shapes need a GPU: try --shapes tiny")
    # All steps, and the server's process, find each other's compiled layers.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "bench-gpu-compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch._dynamo.config.recompile_limit = 64  # for all models together, which share their layers' code
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny shapes only lose time to more
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options, device)

    start.workers(report)
    checks.fast_paths(report)
    limits = ceilings(report)
    forward.measure_8b(report, limits)
    encoder = forward.measure_1b(report, limits)
    forward.measure_270m(report, limits)
    serve.measure(report, encoder)
    forward.measure_rest(report, limits, encoder)

    report.save(and_results=options.save)
    print(json.dumps(report.document))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
