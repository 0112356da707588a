"""What torch reads from the environment when it is loaded, as a server wants it; whatever is set already stays."""

from __future__ import annotations

import os
from pathlib import Path

# Most processes that one engine compiles with; torch starts one for each core of the machine, up to 32, and keeps them.
_COMPILE_PROCESSES = 4


def set_torch_defaults(models_dir: Path, engines: int = 1) -> None:
    """For a process that will load torch, and those that it starts: so many engines on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # Compiled layers are kept beside the encoders they belong to, so that only the first start waits for them.
        "TORCHINDUCTOR_CACHE_DIR": str(models_dir.expanduser() / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(max(cores // engines, 1), _COMPILE_PROCESSES)),
    }
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        # Every batch has another size: blocks that can grow leave no gaps of the wrong size between them.
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
