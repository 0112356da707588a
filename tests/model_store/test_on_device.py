"""The forward pass on a device of its own: nothing waits for it, nothing is left on the host, few graphs serve all.

The device is torch's `meta`, which has shapes and no numbers: an operation that would have to wait for a GPU's number
raises. Compiled graphs are counted on the CPU, with the flash kernel's stand-in.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from model_store.encoder.attention import Kernel, implementation_name
from model_store.encoder.attention_cpu import attend_each_text
from model_store.encoder.encoder import Encoder
from model_store.encoder.merged_linear import merge_projections
from model_store.encoder.packing import PackedBatch, to_device
from model_store.encoder.pipeline import finish_of, forward
from model_store.encoder.pooling import Wanted
from model_store.rope import fix_frequencies
from tests.cuda_stand_in import Gpus, install
from tests.tiny import FAMILIES, random_rows, tiny_config

META, CPU = torch.device("meta"), torch.device("cpu")
# The first is such as `compile_checked` compiles for: where two sizes are equal, torch takes them for one.
SHAPES = ([3, 24, 9], [16], [3, 40, 17], [100], [9] * 12, [1, 300], [64, 64], [500, 7, 7], [33, 2, 90, 4], [128] * 5)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, but for copies of a batch and for numbers of no dimension."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}
        assert len(devices) < 2 or operation.name() == "aten::_to_copy", f"{operation.name()} of {devices}"
        return found


def encoder(family: str, kernel: Kernel, device: torch.device, rope: dict[str, Any] | None = None) -> Encoder:
    dtype, config = torch.bfloat16, tiny_config(family)
    if rope:
        config.rope_parameters = {**config.rope_parameters, **rope}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation=implementation_name(kernel))
    fix_frequencies(model, 512)
    merge_projections(model, device, gated=True)
    manifest: Any = SimpleNamespace(attention="bidirectional", width=64, pooling="mean")
    return Encoder(model.eval().requires_grad_(False), manifest, device, dtype, kernel)


# torch's flash kernel has no soft-capping, which gemma2 needs.
@pytest.mark.parametrize(
    ("family", "kernel"),
    [*product(FAMILIES, ["sdpa"]), *((family, "torch-flash") for family in FAMILIES if family != "gemma2")],
)
def test_a_batch_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, family: str, kernel: Kernel) -> None:
    install(Gpus(), monkeypatch.setattr)  # for its pinned memory
    assert_waits_for_nothing(encoder(family, kernel, META))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_are_not_chosen_by_the_length_of_a_batch(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    install(Gpus(), monkeypatch.setattr)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 512}
    rope = {"rope_type": kind, "factor": 4.0, **(factors if kind == "longrope" else {})}
    assert_waits_for_nothing(encoder("phi3" if kind == "longrope" else "llama", "torch-flash", META, rope))


@torch.inference_mode()
def assert_waits_for_nothing(on_device: Encoder) -> None:
    kernel = on_device.kernel
    for lengths in SHAPES[:3]:
        mode: Any = OneDevice
        with mode() if kernel == "torch-flash" else nullcontext():
            batch = on_device.place(PackedBatch.pack(random_rows(lengths), "mean"))
            finish = finish_of([Wanted(64)] * len(lengths), [1] * len(lengths))
            assert forward(on_device, batch, **to_device(finish, META)).device == META


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (16, None), (None, 5.0), (16, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_loop_over_texts_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    install(Gpus(), monkeypatch.setattr)
    query, key = (torch.empty(1, heads, 160, 32, dtype=dtype, device=META) for heads in (4, 2))
    starts = torch.tensor([0, 3, 20, 60, 160, 160], dtype=torch.int32)
    assert attend_each_text(query, key, key, starts, 0.1, window, window, softcap).shape == (1, 160, 4, 32)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_two_graphs_serve_batches_of_every_shape(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    install(Gpus(), monkeypatch.setattr)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    kernel: Kernel = "sdpa" if family == "gemma2" else "torch-flash"
    plain = encoder(family, kernel, CPU)
    batches = [plain.place(PackedBatch.pack(random_rows(lengths), "mean")) for lengths in SHAPES]
    expected = [plain.hidden(batch) for batch in batches]
    for layer in plain.model.layers:
        layer.compile(backend=count, dynamic=True, fullgraph=True)
    for batch, hidden in zip(batches, expected, strict=True):
        torch.testing.assert_close(plain.hidden(batch), hidden)
    assert len(graphs) <= 2
    torch._dynamo.reset()
