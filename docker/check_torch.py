"""Whether the torch that pip has chosen can do what the image is for: python docker/check_torch.py DEVICE

The Dockerfile asks, before it installs the rest. It needs nothing but torch.
"""

from __future__ import annotations

import sys


def problem(device: str, version: str, cuda: str | None) -> str:
    """Why this build of torch will not do, or "" if it will.

    Args:
        device: The build argument DEVICE.
        version: Torch's own version.
        cuda: The release of CUDA that it was built with; None is a build for the CPU.
    """
    if device not in ("cuda", "cpu"):
        return f"DEVICE is {device!r}, and can be cuda or cpu"
    if device == "cuda" and not cuda:
        return (
            f"torch {version} is a build without CUDA, and this image is for a GPU. Take torch's wheel out of "
            "docker/wheels and name an index with CUDA in TORCH_INDEX, or none; or build for the CPU with "
            "--build-arg DEVICE=cpu (docker/compose.cpu.yml does)"
        )
    return ""


def main() -> str:
    """Report; the exit status, or the message to exit with."""
    import torch

    found = problem(sys.argv[1], torch.__version__, torch.version.cuda)
    print(f"torch {torch.__version__}, built with {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")
    return found


if __name__ == "__main__":
    sys.exit(main() or 0)
