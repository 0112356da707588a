"""Packed layers against the plain ones they stand for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from model_store.encoder import cpu_linear
from model_store.encoder.cpu_linear import ROW_BLOCK, PackedGatedMlp, PackedLinear, can_pack, pack_linears
from tests.tiny import FAMILIES, product_weights, tiny_model

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this CPU has no 16-bit products in oneDNN")

# bfloat16 keeps 8 bits; the plain layers round between their steps, the packed ones once.
NEAR = 2**-6


def near(packed: torch.Tensor, plain: torch.Tensor) -> bool:
    return bool((packed - plain).abs().max() <= NEAR * plain.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 700])
@torch.inference_mode()
def test_a_packed_layer_gives_what_the_layer_gave(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 48, dtype=torch.bfloat16)
    assert near(PackedLinear(linear)(x), linear(x))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_s_mlp(family: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family).bfloat16()
    x = torch.randn(1, 33, model.config.hidden_size, dtype=torch.bfloat16)
    plain = [layer.mlp(x) for layer in model.layers]
    pack_linears(model)
    for layer, expected in zip(model.layers, plain, strict=True):
        assert isinstance(layer.mlp, PackedGatedMlp) == (family != "phi3")  # which has gate and up in one layer
        assert near(layer.mlp(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, ROW_BLOCK, 3 * ROW_BLOCK + 5])
@torch.inference_mode()
def test_every_product_over_blocks_has_the_same_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").to(dtype)
    x = torch.randn(1, rows, model.config.hidden_size, dtype=dtype)
    mlp, attention = model.layers[0].mlp, model.layers[0].self_attn
    plain = mlp(x), attention.q_proj(x)
    pack_linears(model, ROW_BLOCK)
    with torch.profiler.profile(record_shapes=True) as profile:
        found = model.layers[0].mlp(x), attention.q_proj(x)
    products = [event for event in profile.events() if event.name.startswith("mkldnn::_linear_pointwise")]
    assert len(products) == 4 * -(-rows // ROW_BLOCK)  # gate, up, down and q
    assert {event.input_shapes[0][0] for event in products} == {ROW_BLOCK}
    for blocks, expected in zip(found, plain, strict=True):
        assert near(blocks, expected)


def test_no_layer_is_left_out_and_none_is_counted_twice() -> None:
    model = tiny_model("qwen2").bfloat16()
    before = product_weights(model)
    pack_linears(model)
    assert not [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    assert product_weights(model) == before


def test_the_weights_go_with_the_model() -> None:
    gc.collect()
    before = len(cpu_linear._weights)
    model = tiny_model("llama").bfloat16()
    pack_linears(model)
    assert len(cpu_linear._weights) > before
    del model
    gc.collect()
    assert len(cpu_linear._weights) == before


@torch.inference_mode()
def test_layers_of_a_kind_share_one_graph() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    x = torch.randn(1, 20, 48, dtype=torch.bfloat16)
    linears = [nn.Linear(48, 80, dtype=torch.bfloat16) for _ in range(12)]
    for linear in linears:
        packed = PackedLinear(linear)
        packed.compile(backend=backend, dynamic=True, fullgraph=True)
        assert near(packed(x), linear(x))
    assert len(graphs) == 1
    torch._dynamo.reset()
