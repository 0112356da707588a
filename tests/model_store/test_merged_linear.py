"""Query, key and value by one product, gate and up by another, against the layers as transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_store.encoder.attention import implementation_name
from model_store.encoder.merged_linear import PartOfProduct, SharedProduct, merge_projections
from model_store.encoder.packing import PackedBatch
from model_store.encoder.quantization import EmulatedFp8Linear, emulate_fp8
from tests.cpus import SAME_BITS
from tests.tiny import FAMILIES, product_weights, random_rows, tiny_model

CPU = torch.device("cpu")


@torch.inference_mode()
def hidden(model: Any, lengths: list[int]) -> Tensor:
    batch = PackedBatch.pack(random_rows(lengths), "mean").filled_up_to(16)
    ids, positions = batch.token_ids[None], batch.position_ids[None]
    layout = {"cu_seqlens": batch.cu_seqlens, "longest": max(batch.longest, 8)}
    found: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **layout).last_hidden_state
    return found


def pair(family: str, dtype: torch.dtype, gated: bool) -> tuple[Any, Any]:
    plain, merged = (tiny_model(family).to(dtype) for _ in range(2))
    for model in (plain, merged):
        model.set_attn_implementation(implementation_name("sdpa"))
    merge_projections(merged, CPU, gated)
    return plain, merged


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_vectors_stay(family: str, dtype: torch.dtype, gated: bool) -> None:
    plain, merged = pair(family, dtype, gated)
    parts = sum(isinstance(module, PartOfProduct) for module in merged.modules())
    assert parts == (0 if family == "phi3" else 3 * (3 + 2 * gated))  # phi3 has both in one already; of three layers
    for lengths in ([16], [3, 40, 17], [200, 5]):
        assert_near(hidden(merged, lengths), hidden(plain, lengths), dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, same_bits: bool = SAME_BITS) -> None:
    """A product of more outputs is the same sums; off AMD's CPUs its size may choose a kernel that orders them anew.

    An activation of rows apart may round a few float32 numbers otherwise on any CPU.
    """
    if same_bits:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        cosines = torch.cosine_similarity(found.double(), expected.double(), dim=-1)
        assert cosines.min() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)


def test_a_bias_is_merged_too_and_no_weight_is_lost() -> None:
    plain, merged = pair("qwen2", torch.float32, gated=True)
    assert product_weights(merged) == product_weights(plain)
    assert merged.layers[0].self_attn.q_proj.product.linear.bias is not None


def test_the_parts_may_be_asked_for_in_any_order_and_a_forward_that_failed_leaves_nothing() -> None:
    linear = nn.Linear(8, 9)
    shared = SharedProduct(linear, [4, 3, 2])
    parts = [PartOfProduct(shared, number) for number in range(3)]
    x, other = torch.randn(2, 8), torch.randn(2, 8)
    parts[1](other)  # and then it fails
    found = {number: parts[number](x) for number in (2, 0, 1)}
    torch.testing.assert_close(torch.cat([found[number] for number in range(3)], -1), linear(x))
    assert shared._input is None
    assert shared._outputs == []


def test_an_input_is_quantised_once_for_all_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, merged = pair("llama", torch.bfloat16, gated=True)
    emulate_fp8(merged)
    layers = [module for module in merged.layers[0].modules() if isinstance(module, EmulatedFp8Linear)]
    assert len(layers) == 4  # instead of seven


def test_one_graph_serves_all_layers() -> None:
    torch._dynamo.reset()
    _, merged = pair("llama", torch.float32, gated=True)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    expected = hidden(merged, [5, 20])
    for layer in merged.layers:
        layer.compile(backend=count, dynamic=True, fullgraph=True)
    torch.testing.assert_close(hidden(merged, [5, 20]), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()
