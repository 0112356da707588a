"""The worker on a stand-in GPU: it starts, and every fast path gives the vectors of transformers' own forward."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from model_store.manifest import read_manifest
from model_store.text.tokenizer import TokenizedText
from service.batching.limits import Limits
from service.device.backend import LocalBackend
from service.device.worker import EncoderWorker, is_out_of_memory
from service.embedding.rows import EmbedRow
from service.errors import DeviceLost, OutOfMemory, StartupError
from service.metrics import Metrics
from service.settings import Settings
from tests.cuda_stand_in import Gpus, flash_attention_forward, install
from tests.tiny import FAMILIES, build_tiny, normalized, padded_vectors, random_rows

# Rows of one batch: shorter than a text of filler, as long as a graph, and longer than all of them.
BATCHES = ([5], [16], [3, 9, 20], [40, 24], [100, 3, 90])


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "encoder"
    build_tiny(folder, request.param)
    return folder


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return install(Gpus(), monkeypatch.setattr)


def settings(folder: Path, **given: Any) -> Settings:
    given = {
        "device": "auto",
        "compile": "off",
        "cuda_graphs": "off",
        "token_budget": 128,
        "max_input_tokens": 100,
        **given,
    }
    return Settings(model=str(folder), **given)


async def started(folder: Path, metrics: Metrics | None = None, **given: Any) -> EncoderWorker:
    asked = settings(folder, **given)
    worker = EncoderWorker(folder, asked, metrics or Metrics())
    await worker.start(Limits(asked, read_manifest(folder), "cuda"))
    return worker


def expected(folder: Path, rows: list[TokenizedText]) -> torch.Tensor:
    """By transformers' own classes, padded, in float32."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert load_file(folder / "model.safetensors")
    return normalized(padded_vectors(model, rows))


async def assert_right(worker: EncoderWorker, folder: Path, least_cosine: float) -> None:
    width = read_manifest(folder).width
    for number, lengths in enumerate(BATCHES):
        rows = random_rows(lengths, seed=number)
        found = np.stack(await worker.run_batch([EmbedRow(row, width) for row in rows]))  # type: ignore[arg-type]
        cosines = (torch.from_numpy(found) * expected(folder, rows)).sum(1)
        assert cosines.min() > least_cosine, lengths


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
async def test_it_starts_on_one_gpu(tmp_path: Path, gpus: Gpus, device: str) -> None:
    build_tiny(tmp_path / "encoder")
    worker = await started(tmp_path / "encoder", device=device)
    assert (worker.device, worker.dtype, worker.kernel) == ("cuda:0", "bfloat16", "torch-flash")
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    worker.stop()


async def test_every_thread_is_on_its_own_gpu_and_none_spins(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        gpus = install(Gpus(count=2), patch.setattr)
        worker = await started(tmp_path / "encoder", device="cuda:1")
        await assert_right(worker, tmp_path / "encoder", 0.999)
        assert worker.device == "cuda:1"
        chosen = {name.partition("_")[0]: index for name, index in gpus.current.items()}
        assert (chosen["device"], chosen["results"]) == (1, 1)
        assert gpus.done["event awaited, blocking"] >= len(BATCHES)
        assert not gpus.done["event awaited, spinning"]
        worker.stop()


async def test_every_family(encoder: Path, gpus: Gpus) -> None:
    worker = await started(encoder)
    softcap = read_manifest(encoder).model_type == "gemma2"
    assert worker.kernel == ("sdpa" if softcap else "torch-flash")
    await assert_right(worker, encoder, 0.999)
    worker.stop()


async def test_every_family_captured(encoder: Path, gpus: Gpus) -> None:
    if read_manifest(encoder).model_type == "gemma2":
        with pytest.raises(StartupError, match="LLM2VEC_CUDA_GRAPHS needs an attention kernel other than sdpa"):
            await started(encoder, cuda_graphs="on")
        return
    worker = await started(encoder, cuda_graphs="on")
    await assert_right(worker, encoder, 0.999)
    worker.stop()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
async def test_compiled_and_captured(tmp_path: Path, gpus: Gpus, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    build_tiny(tmp_path / "encoder", family)
    torch._dynamo.reset()
    worker = await started(tmp_path / "encoder", compile="on", cuda_graphs="on")
    await assert_right(worker, tmp_path / "encoder", 0.999)
    worker.stop()


@pytest.mark.parametrize(
    ("installed", "wrong", "serves"),
    [
        ((), (), "torch-flash"),
        (("FA3", "FA4"), (), "torch-flash (FA3)"),
        (("FA4",), (), "torch-flash (FA4)"),
        (("FA3", "FA4"), ("FA3",), "torch-flash (FA4)"),
        (("FA3",), ("FA3",), "torch-flash"),
    ],
)
async def test_a_later_flash_attention_serves_where_it_is_installed_and_right(
    tmp_path: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch, installed: Any, wrong: Any, serves: str
) -> None:
    active: list[str] = []

    def activate(name: str) -> None:
        if name not in installed:
            raise ImportError(name)
        active.append(name)

    def attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        found, *others = flash_attention_forward(*arguments, **options)
        return (found.neg() if active and active[0] in wrong else found, *others)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda **_: active.clear())
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", attend)
    build_tiny(tmp_path / "encoder")
    worker = await started(tmp_path / "encoder")
    assert worker.kernel == serves
    assert f"torch-flash ({active[0]})" == serves if active else serves == "torch-flash"
    await assert_right(worker, tmp_path / "encoder", 0.999)
    worker.stop()


async def test_a_gpu_without_bfloat16_serves_in_float16_or_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Gpus(capability=(7, 5), name="Tesla T4"), monkeypatch.setattr)
    for family, dtype in (("llama", "float16"), ("gemma3_text", "float32")):
        build_tiny(tmp_path / family, family)
        worker = await started(tmp_path / family)
        assert (worker.dtype, worker.kernel) == (dtype, "sdpa")
        await assert_right(worker, tmp_path / family, 0.9999)
        worker.stop()


async def test_a_backend_starts_and_reports_its_memory(tmp_path: Path, gpus: Gpus) -> None:
    manifest = build_tiny(tmp_path / "encoder")
    asked, metrics = settings(tmp_path / "encoder"), Metrics()
    worker = EncoderWorker(tmp_path / "encoder", asked, metrics)
    backend = LocalBackend(worker, asked, manifest, Limits(asked, manifest, "cuda"), metrics)
    assert await backend.start() == {"device": "cuda:0", "dtype": "bfloat16", "attention": "torch-flash"}
    assert b'gpu_memory_bytes{device="cuda:0",kind="total"}' in metrics.page()
    backend.stop()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_are_out_of_memory(error: RuntimeError, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
async def test_memory_that_runs_out_anywhere_is_the_rows_own_error(tmp_path: Path, gpus: Gpus, words: str) -> None:
    build_tiny(tmp_path / "encoder")
    metrics = Metrics()
    worker = await started(tmp_path / "encoder", metrics)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise RuntimeError(words)

        patch.setattr(torch.cuda, "Event", full)
        with pytest.raises(OutOfMemory):
            await worker.run_batch([EmbedRow(row, 64) for row in random_rows([5])])
    assert gpus.done["empty_cache"] == 1
    assert b"oom" in metrics.page()
    await assert_right(worker, tmp_path / "encoder", 0.999)
    worker.stop()


@pytest.mark.parametrize("lost", [False, True])
async def test_after_a_batch_that_failed_the_device_thread_alone_tries_the_device(
    tmp_path: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    build_tiny(tmp_path / "encoder")
    worker = await started(tmp_path / "encoder")
    event: Any = torch.cuda.Event
    zeros, threads = torch.zeros, []

    def failing(**options: Any) -> Any:
        one = event(**options)

        def fails() -> None:
            monkeypatch.setattr(torch, "zeros", tried)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(one, "synchronize", fails)
        return one

    def tried(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return zeros(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "Event", failing)
    with pytest.raises(DeviceLost if lost else RuntimeError, match="illegal memory access"):
        await worker.run_batch([EmbedRow(row, 64) for row in random_rows([5])])
    assert threads == ["device"]
    worker.stop()
