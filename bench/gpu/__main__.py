"""What the encoder and the server do on a GPU, and how near that comes to what the device can do.

    python -m bench.gpu [--out build] [--seconds 520] [--commit NAME] [--save]

`python -m pytest -m gpu tests/gpu` checks that it is right. One call here takes at most nine minutes and measures

1. what the device can do at most;
2. 8B: batches by their tokens with and without graphs, one at a time and queued, and kernels by their time;
3. 1.3B: the same;
4. 270M: batches by their tokens;
5. the server with 1.3B: bulk, queries, queries beside bulk;
6. what time is left for: 8B with unmerged projections, 8B in fp8.

gpu.json in the folder --out is written after every step, so that a run that is killed leaves the figures that it had,
and the last line printed is the same document. A step that no longer fits into --seconds, or lacks something, is named
under "skipped" with the reason. A step that fails is named under "errors", the run goes on, and the exit status is 1 in
the end; a missed target fails nothing. `--shapes tiny` tries all that the device allows in about a minute. Where there
is no git history to ask, --commit says what is measured.

The weights are random, of real models' shapes, and made on the device. All steps but 5 need torch and transformers
alone, step 5 needs what pyproject.toml names. For a machine without a network, download the wheels that it lacks (9 MB)
elsewhere, and install them there:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform \
        manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt \
        -d WHEELS pydantic pydantic-core pydantic-settings annotated-types typing-extensions typing-inspection \
        python-dotenv prometheus-client orjson fastapi starlette opentelemetry-api annotated-doc uvicorn httptools \
        pybase64 uvloop
    pip install --no-index --no-deps --target SITE WHEELS/*.whl && export PYTHONPATH=SITE
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from bench.report import finish, options_of


def main() -> int:
    """Measure and report."""
    shapes, devices = ("real", "tiny"), ("auto", "cpu", "cuda")
    options = options_of(__doc__, out=Path("build"), shapes=shapes, device=devices, seconds=520.0, commit="")

    # The processes of HTTP clients import this module too, and can do without torch.
    import torch

    from bench.gpu import forward, serve
    from bench.gpu.report import Report
    from model_store.encoder.devices import choose_device

    device = choose_device(options.device)
    if options.shapes == "real" and device.type != "cuda":
        raise SystemExit("real shapes need a GPU: try --shapes tiny")
    # All steps, and the server's process, find each other's compiled layers.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "bench-gpu-compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch._dynamo.config.recompile_limit = 64  # for all models together, which share their layers' code
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny shapes only lose time to more
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options, device)

    forward.ceilings(report)
    forward.measure(report, "8B")
    encoder = forward.measure(report, "1.3B")
    forward.measure(report, "270M")
    serve.measure(report, encoder)
    forward.measure_rest(report)

    report.save()
    finish("gpu", report.document, options.save)
    return int(bool(report.errors))


if __name__ == "__main__":
    sys.exit(main())
