"""LLM2VEC_EQUAL_BITS: a text has the same bits in every batch, or the server says why not and does not start."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.build.self_test import SelfTestError, check_equal_bits
from model_store.encoder.devices import DeviceError
from model_store.encoder.encoder import Encoder
from model_store.encoder.quantization import QuantizationError
from model_store.manifest import read_manifest
from service.batching.limits import Limits
from service.device.worker import EncoderWorker
from service.embedding.rows import EmbedRow
from service.errors import StartupError
from service.metrics import Metrics
from service.settings import Settings
from tests.cuda_stand_in import Gpus, install
from tests.tiny import build_tiny, random_rows


async def started(folder: Path, **given: Any) -> EncoderWorker:
    settings = Settings(model=str(folder), equal_bits=True, token_budget=2048, **given)
    worker = EncoderWorker(folder, settings, Metrics())
    await worker.start(Limits(settings, read_manifest(folder), "cpu"))
    return worker


@pytest.mark.parametrize(
    ("dtype", "compiled", "quantization"),
    [
        *product(("float32", "bfloat16"), ("on", "off"), ("none",)),
        *product(("float32", "bfloat16"), ("on",), ("int8",)),
    ],
)
async def test_a_text_has_the_same_bits_alone_and_among_others(
    tmp_path: Path, dtype: str, compiled: str, quantization: str
) -> None:
    build_tiny(tmp_path / "encoder")
    torch._dynamo.reset()  # the graphs of encoders before this one count towards torch's limit
    asked = {"device": "cpu", "dtype": dtype, "compile": compiled, "quantization": quantization}
    try:
        worker = await started(tmp_path / "encoder", **asked)
    except (SelfTestError, DeviceError, QuantizationError) as error:
        pytest.skip(str(error))
    rows = [EmbedRow(row, 64) for row in random_rows([1, 2, 15, 31, 33, 100, 300, *range(3, 40)], seed=1)]
    together = np.stack(await worker.run_batch(rows))  # type: ignore[arg-type]
    for row, expected in zip(rows, together, strict=True):
        (alone,) = await worker.run_batch([row])
        np.testing.assert_array_equal(alone, expected)
    worker.stop()


def test_the_start_finds_bits_that_depend_on_the_batch(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder")
    encoder = Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")

    def one_last_bit_more(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out if out.shape[1] < 256 else torch.nextafter(out, torch.tensor(9.0))

    encoder.model.layers[0].register_forward_hook(one_last_bit_more)
    with pytest.raises(SelfTestError, match=r"on this CPU a text has other bits .* leave LLM2VEC_EQUAL_B"):
        check_equal_bits(encoder)


async def test_int8_needs_compiled_layers_for_it(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder")
    with pytest.raises(StartupError, match="with int8 needs compiled layers: set LLM2VEC_COMPILE=on"):
        await started(tmp_path / "encoder", device="cpu", quantization="int8")


async def test_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Gpus(), monkeypatch.setattr)
    build_tiny(tmp_path / "encoder")
    with pytest.raises(DeviceError, match=r"LLM2VEC_EQUAL_BITS.* need a CPU .* not cuda:0 and bfloat16"):
        await started(tmp_path / "encoder", device="cuda")
