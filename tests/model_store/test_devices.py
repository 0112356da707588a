"""Which device and dtype an encoder gets, and what a user is told who can't have the one that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_store.encoder.devices import DeviceError, choose_device, choose_dtype, explain_no_gpu, has_kernels
from tests.cuda_stand_in import Gpus, install

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BUILD = ("2.13.0+cu130", "13.0")


def gpus(monkeypatch: pytest.MonkeyPatch, **what: Any) -> Gpus:
    return install(Gpus(**what), monkeypatch.setattr)


@pytest.mark.parametrize(("asked", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_index_however_it_was_asked_for(monkeypatch: pytest.MonkeyPatch, asked: str, index: int) -> None:
    gpus(monkeypatch, count=2)
    assert choose_device(asked) == torch.device("cuda", index)
    torch.cuda.set_device(choose_device(asked))  # which takes no device without an index


@pytest.mark.parametrize("asked", ["cuda:2", "cuda:7"])
def test_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    gpus(monkeypatch, count=2)
    with pytest.raises(DeviceError, match="2 GPUs"):
        choose_device(asked)


@pytest.mark.parametrize("asked", ["mps", "gpu", "cuda:x"])
def test_what_is_no_device(asked: str) -> None:
    with pytest.raises(DeviceError, match="use auto, cpu, cuda or cuda:N"):
        choose_device(asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_says_why() -> None:
    assert choose_device("auto") == CPU
    with pytest.raises(DeviceError, match="LLM2VEC_DEVICE=cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("version", "cuda", "driver", "visible", "told"),
    [
        ("2.13.0+cpu", None, "580.65.06", None, ["built without CUDA", "docker/wheels"]),
        (*BUILD, None, None, ["no NVIDIA driver", "--gpus all"]),
        (*BUILD, "550.54.15", None, ["550.54.15", "CUDA 13.0", "needs driver 580", "TORCH_INDEX"]),
        ("2.13.0+cu126", "12.6", "470.82.01", None, ["470.82.01", "CUDA 12.6", "needs driver 525"]),
        (*BUILD, "580.65.06", "", ["CUDA_VISIBLE_DEVICES=''"]),
        (*BUILD, "580.65.06", "-1", ["CUDA_VISIBLE_DEVICES='-1'"]),
        ("2.13.0+cu126", "12.6", "550.54.15", None, []),
        (*BUILD, "580.65.06", None, []),
    ],
)
def test_why_there_is_no_gpu(
    version: str, cuda: str | None, driver: str | None, visible: str | None, told: Any
) -> None:
    sentence = explain_no_gpu(version, cuda, driver, visible)
    assert bool(sentence) == bool(told)
    assert all(words in sentence for words in told)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # code for an older minor capability runs
        ((8, 0), ["sm_86", "sm_90"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((10, 3), ["sm_100", "sm_120"], True),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX
        ((12, 0), ["sm_80", "sm_90a"], False),
    ],
)
def test_which_gpus_a_build_of_torch_runs_on(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert has_kernels(capability, built) == runs


def test_a_gpu_too_old_for_the_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, capability=(7, 0), name="Tesla V100")
    for asked in ("auto", "cuda"):
        with pytest.raises(DeviceError, match=r"Tesla V100 has compute capability 7\.0.*sm_75.*TORCH_INDEX"):
            choose_device(asked)


@pytest.mark.parametrize(
    ("capability", "fits_float16", "chosen"),
    [
        ((9, 0), True, torch.bfloat16),
        ((8, 0), False, torch.bfloat16),
        ((7, 5), True, torch.float16),
        ((7, 5), False, torch.float32),
    ],
)
def test_bfloat16_only_where_the_gpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits_float16: bool, chosen: torch.dtype
) -> None:
    gpus(monkeypatch, capability=capability)
    assert choose_dtype("auto", CUDA, fits_float16) == chosen
    assert choose_dtype("float32", CUDA, fits_float16) == torch.float32


def test_a_dtype_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, capability=(7, 5))
    with pytest.raises(DeviceError, match=r"7\.5 has no bfloat16.*LLM2VEC_DTYPE=auto"):
        choose_dtype("bfloat16", CUDA)
    with pytest.raises(DeviceError, match="do not fit into float16"):
        choose_dtype("float16", CUDA, float16=False)
    with pytest.raises(DeviceError, match="float16 is for GPUs"):
        choose_dtype("float16", CPU, float16=True)
