"""The choice of an encoder's device and arithmetic, and why a GPU can't be used. Knows only torch and the driver."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import torch

from model_store.errors import UserError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Major release of CUDA → the oldest driver branch that runs it (NVIDIA, "CUDA Compatibility", minor versions).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

# GPUs of this compute capability and later multiply bfloat16; older ones emulate it and are many times slower.
BFLOAT16_CAPABILITY = (8, 0)

_DRIVER_FILE = Path("/proc/driver/nvidia/version")

_CPU_WAY_OUT = "or set LLM2VEC_DEVICE=cpu"
_OLD_CUDA_WAY_OUT = (
    "install torch for an older CUDA release (docs/deployment.md has the image's build argument TORCH_INDEX)"
)


class DeviceError(UserError):
    """This machine can't compute on the device or in the dtype asked for."""


def choose_device(asked: str) -> torch.device:
    """The device of a torch device name; with `auto` the first GPU, or the CPU if torch can't use a GPU.

    A CUDA device always has an index: streams, events and graphs belong to one GPU, and torch needs the index to make
    a device the current one.

    Raises:
        DeviceError: if that device is not on this machine or torch can't compute on it.
    """
    if asked == "auto":
        if cuda_fault():
            return torch.device("cpu")
        asked = "cuda"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"{asked!r} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"device {asked!r} is not supported: use auto, cpu, cuda or cuda:N")
    if fault := cuda_fault():
        raise DeviceError(f"device {asked!r} can't be used: {fault}, {_CPU_WAY_OUT}")
    device = torch.device("cuda", device.index or 0)
    if device.index >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device {asked!r} is not here: torch sees {_gpus(count)}: use auto, cpu, cuda or cuda:N")
    if fault := _kernel_fault(device):
        raise DeviceError(f"device {asked!r} can't be used: {fault}, {_CPU_WAY_OUT}")
    return device


def all_gpus() -> list[str]:
    """The names of the CUDA devices that torch can use."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def cuda_fault() -> str:
    """Why torch can use no GPU here and the way out, without a full stop; empty if it can use one."""
    if torch.cuda.is_available():
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return explain_no_gpu(torch.__version__, torch.version.cuda, installed_driver(), visible) or _torchs_own_words()


def explain_no_gpu(version: str, cuda: str | None, driver: str | None, visible: str | None) -> str:
    """Why torch sees no GPU, told from the four things that decide it; empty if they don't explain it.

    `cuda` is the CUDA release that torch is built for, `visible` the value of CUDA_VISIBLE_DEVICES.
    """
    if cuda is None:
        return (
            f"torch {version} is built without CUDA: install a build with CUDA (an image gets one where docker/wheels "
            "holds no CPU wheel)"
        )
    if driver is None:
        return (
            f"there is no NVIDIA driver ({_DRIVER_FILE} does not exist): install one, or start the container with "
            "--gpus all and the NVIDIA Container Toolkit"
        )
    needed = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < needed:
        return (
            f"the NVIDIA driver is {driver}, but torch {version} is built for CUDA {cuda}, which needs driver {needed} "
            f"or later: update the driver, or {_OLD_CUDA_WAY_OUT}"
        )
    if visible is not None:
        return f"torch sees no GPU with CUDA_VISIBLE_DEVICES={visible!r}: unset it, or name GPUs that are here"
    return ""


def installed_driver() -> str | None:
    """The version of this machine's NVIDIA driver, such as 580.65.06; None without a driver."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else None


def choose_dtype(asked: Dtype, device: torch.device, float16: bool = False) -> torch.dtype:
    """The dtype asked for; with `auto` the one that suits the device and the model.

    `auto` is bfloat16 on devices that multiply it: GPUs of capability 8.0 and later, CPUs with AVX-512-bf16 or AMX.
    Otherwise it is float16 on a GPU if `float16` says that the model's numbers fit into it, and else float32.

    Raises:
        DeviceError: if the device can't compute in the dtype asked for, or the model's numbers don't fit into it.
    """
    has_bfloat16 = _has_bfloat16(device)
    if asked == "auto":
        if has_bfloat16:
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" and float16 else torch.float32
    if asked == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        raise DeviceError(
            f"{_described(device)} has no bfloat16 products, which need compute capability 8.0: set LLM2VEC_DTYPE=auto"
        )
    if asked == "float16" and device.type != "cuda":
        raise DeviceError("float16 is for GPUs without bfloat16 products: set LLM2VEC_DTYPE=auto")
    if asked == "float16" and not float16:
        raise DeviceError("this model's numbers do not fit into float16: set LLM2VEC_DTYPE=auto")
    return DTYPES[asked]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a build of torch runs on a GPU of this compute capability; `built` are its targets, such as sm_90.

    Code runs on the GPU that it was built for and on later ones of the same major capability. The driver compiles PTX
    (compute_90) for any later GPU.
    """
    for arch in built:
        kind, _, number = arch.partition("_")
        built_for = divmod(int(re.sub(r"\D", "", number)), 10)
        if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
            return True
    return False


def _kernel_fault(device: torch.device) -> str:
    built = torch.cuda.get_arch_list()
    if has_kernels(torch.cuda.get_device_capability(device), built):
        return ""
    return (
        f"{_described(device)}, for which torch {torch.__version__} (CUDA {torch.version.cuda}) has no kernels; it has "
        f"{', '.join(built)}: {_OLD_CUDA_WAY_OUT}"
    )


def _described(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count != 1)}"


def _torchs_own_words() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return f"torch {torch.__version__} sees no GPU and gives no reason"
