"""Sets the environment variables that torch and the C library read when they are loaded.

A variable that is already set stays.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

# The most processes that one engine compiles with. By default torch starts and keeps one for each core, up to 32.
_COMPILE_PROCESSES = 4

# glibc from 2.35 on then asks Linux for huge pages, for all memory of its malloc. A CPU reads weights faster so: its
# prefetching ends at the border of a page. Where Linux gives none, nothing changes.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def start_again_with_huge_pages() -> None:
    """Start this program again, in the same process, with huge pages; at its second start return.

    The C library reads its variable once, before Python runs.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = _HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_torch_defaults(models_dir: Path, engines: int = 1) -> None:
    """Set the defaults for this process and its children. `engines` is the number of engines on this machine."""
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
