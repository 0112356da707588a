"""fp8 layers against the layers they replace, and the GPU's kernel against the slow twin that stands in for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from model_store.encoder.quantization import (
    EmulatedFp8Linear,
    Fp8Linear,
    QuantizationError,
    emulate_fp8,
    quantize_fp8,
    quantize_rows,
    replace_linears,
)
from model_store.manifest import quantized_space
from tests.tiny import FAMILIES, padded_vectors, random_rows, tiny_model

CPU = torch.device("cpu")

# Of the length of a product: 3 bits after the leading one leave an error of up to 1/16, 2.6 % of a number on average
# (root mean square), in both factors. 3.4 to 3.7 % was seen, whatever the size.
FP8_ERROR = 0.045

# Of the length of a product of the same float8 numbers: one rounding to bfloat16 or two, 2⁻⁹ each at most.
BF16_ERROR = 2**-8

# H100 tensor cores keep about 14 bits of a sum under fast accumulation.
KERNEL_ERROR = 2**-7


def layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def tokens(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """(1, T, K), with a few columns 30 times as large as the rest: decoders have such outliers."""
    x = torch.randn(1, count, width, generator=torch.Generator().manual_seed(count))
    x[..., :: width // 4] *= 30
    return x.to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    """The length of the difference over the length of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_back_within_the_format_s_precision(dtype: torch.dtype) -> None:
    x = torch.cat([tokens(50, 256, dtype)[0] * 10.0**power for power in (-6, 0, 4)])
    x8, scale = quantize_rows(x)
    assert (x8.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (150, 1))
    assert (x8.float().abs().amax(1) == 448).all(), "a scale leaves part of the range unused"
    numbers = x.float()
    allowed = torch.maximum(numbers.abs() / 16, scale / 1024) * (1 + 1e-6)
    assert ((x8.float() * scale - numbers).abs() <= allowed).all()


def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_stays_in_its_row() -> None:
    x = tokens(4, 64, torch.float32)
    x[0, 1] = 0
    x[0, 2, 5] = float("nan")
    x[0, 3, 5] = float("inf")
    out = EmulatedFp8Linear(layer(64, 96, torch.float32, bias=False), CPU)(x)[0]
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()
    assert not out[2:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (2048, 640)])
def test_emulated_layer_is_near_the_one_it_replaces(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    linear = layer(inputs, outputs, dtype, bias)
    x = tokens(33, inputs, dtype)
    out = EmulatedFp8Linear(linear, CPU)(x)
    assert (out.shape, out.dtype) == ((1, 33, outputs), dtype)
    assert error(out, linear(x)) < FP8_ERROR


def test_a_token_s_result_does_not_depend_on_its_neighbours() -> None:
    emulated = EmulatedFp8Linear(layer(64, 96, torch.float32), CPU)
    x = tokens(32, 64, torch.float32)
    loud = x.clone()
    loud[:, 1:] *= 1000
    assert torch.equal(emulated(x)[:, 0], emulated(loud)[:, 0])


@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_s_call_has_the_right_operands(bias: bool) -> None:
    """On the CPU, where torch has the call for testing: the very code that serves on a GPU, against the emulation."""
    real, emulated = (kind(layer(512, 96, torch.bfloat16, bias), CPU) for kind in (Fp8Linear, EmulatedFp8Linear))
    x = tokens(33, 512, torch.bfloat16)
    try:
        out = real(x)
    except RuntimeError as refusal:
        pytest.skip(f"this torch has no rowwise fp8 product on the CPU: {refusal}")
    assert error(out, emulated(x)) < BF16_ERROR


@pytest.mark.parametrize("count", [1, 40])
def test_cuda_s_checks_of_shapes_and_strides_are_met(count: int) -> None:
    """Without a GPU: on the meta device torch makes them, and computes nothing."""
    meta = torch.device("meta")
    out = Fp8Linear(layer(64, 96, torch.bfloat16), meta)(tokens(count, 64, torch.bfloat16).to(meta))
    assert (out.shape, out.dtype) == ((1, count, 96), torch.bfloat16)


@pytest.mark.parametrize("kind", [Fp8Linear, EmulatedFp8Linear])
def test_one_graph_serves_every_number_of_tokens(kind: type[Fp8Linear]) -> None:
    meta = torch.device("meta")
    fp8 = kind(layer(64, 96, torch.bfloat16), meta)
    torch._dynamo.reset()
    compiled = torch.compile(fp8, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        shapes = [compiled(tokens(count, 64, torch.bfloat16).to(meta)).shape for count in (16, 2, 300)]
    assert shapes == [(1, 16, 96), (1, 2, 96), (1, 300, 96)]


def test_compiled_emulation_is_the_eager_one() -> None:
    emulated = EmulatedFp8Linear(layer(64, 96, torch.float32), CPU)
    torch._dynamo.reset()
    compiled = torch.compile(emulated, fullgraph=True, dynamic=True, backend="aot_eager")
    x = tokens(40, 64, torch.float32)
    assert torch.equal(compiled(x), emulated(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_decoder_is_replaced_and_its_vectors_stay_near(family: str) -> None:
    model = tiny_model(family)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    rows = random_rows([1, 3, 17, 40, 70, 9])
    before = padded_vectors(model, rows)
    emulate_fp8(model)
    replaced = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert replaced == linears
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert isinstance(model.embed_tokens, nn.Embedding)
    # Errors of 4 % meet few dimensions and weights large enough to be sensitive: 0.983 was the lowest seen, 0.993
    # the average. A real encoder's vectors are nearer: bench/quantization.py.
    assert torch.cosine_similarity(before, padded_vectors(model, rows)).min() > 0.98


def test_old_weights_are_freed_one_by_one() -> None:
    model = tiny_model("llama")
    seen: list[weakref.ref[nn.Linear]] = []

    def make(linear: nn.Linear) -> nn.Module:
        assert not any(earlier() for earlier in seen), "a replaced layer still takes its memory"
        seen.append(weakref.ref(linear))
        return EmulatedFp8Linear(linear, CPU)

    replace_linears(model, make)
    assert len(seen) == 7 * len(model.layers)


def test_some_layers_only_can_be_replaced() -> None:
    model = tiny_model("llama")
    replace_linears(model, lambda linear: EmulatedFp8Linear(linear, CPU), within=".mlp.")
    replaced = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    wanted = {f"layers.{i}.mlp.{part}_proj" for i in range(3) for part in ("gate", "up", "down")}
    assert replaced == wanted


def test_a_device_without_fp8_is_refused_and_the_model_left_as_it_was() -> None:
    model = tiny_model("llama").bfloat16()
    with pytest.raises(QuantizationError, match="the device is the cpu: set LLM2VEC_QUANTIZATION=none"):
        quantize_fp8(model, CPU)
    assert isinstance(model.layers[0].mlp.down_proj, nn.Linear)


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 96), (64, 90)])
def test_a_layer_that_the_kernel_can_not_read_is_refused(inputs: int, outputs: int) -> None:
    with pytest.raises(QuantizationError, match=f"multiples of 16, but .* {inputs} inputs and {outputs} outputs"):
        Fp8Linear(nn.Linear(inputs, outputs), CPU)


def test_quantised_vectors_are_of_another_space() -> None:
    assert quantized_space("0123456789abcdef", "none") == "0123456789abcdef"
    assert quantized_space("0123456789abcdef", "fp8") == "0123456789abcdef-fp8"


def on_fp8_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Runs where there is a GPU that multiplies fp8."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    skip = pytest.mark.skipif(not able, reason="needs a CUDA device of capability 8.9 or later")
    return cast(Callable[..., None], pytest.mark.gpu(skip(test)))


CUDA = torch.device("cuda")


@on_fp8_gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 16, 17, 300, 2048])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (640, 2048), (4096, 1024)])
def test_gpu_kernel_equals_the_emulation(inputs: int, outputs: int, count: int, bias: bool) -> None:
    linear = layer(inputs, outputs, torch.bfloat16, bias)
    x = tokens(count, inputs, torch.bfloat16).to(CUDA)
    with torch.inference_mode():
        found, wanted = (kind(linear, CUDA)(x) for kind in (Fp8Linear, EmulatedFp8Linear))
    assert error(found, wanted) < KERNEL_ERROR


@on_fp8_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_quantised_decoder_is_near_the_emulated_one(family: str) -> None:
    real, emulated = tiny_model(family).bfloat16(), tiny_model(family).bfloat16()
    quantize_fp8(real, CUDA)
    emulate_fp8(emulated)
    rows = random_rows([3, 17, 40, 70, 9])
    found, wanted = (on_gpu_vectors(model, rows) for model in (real, emulated))
    # The same roundings to float8, but of numbers that differ in their last bits.
    assert torch.cosine_similarity(found, wanted).min() > 0.98


@on_fp8_gpu
def test_gpu_compiles_and_captures() -> None:
    fp8 = Fp8Linear(layer(640, 2048, torch.bfloat16), CUDA)
    torch._dynamo.reset()
    compiled = torch.compile(fp8, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for count in (16, 300, 1000):
            x = tokens(count, 640, torch.bfloat16).to(CUDA)
            assert error(compiled(x), fp8(x)) < KERNEL_ERROR
        x = tokens(64, 640, torch.bfloat16).to(CUDA)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fp8(x)
        x.copy_(tokens(65, 640, torch.bfloat16)[:, 1:])
        graph.replay()
        assert torch.equal(out, fp8(x))


@on_fp8_gpu
def test_gpu_holds_the_small_weights_and_one_large_one() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(layer(2048, 2048, torch.bfloat16) for _ in range(32))
    quantize_fp8(model, CUDA)  # the kernel's own workspace is not what is measured
    model.layers = nn.ModuleList(layer(2048, 2048, torch.bfloat16) for _ in range(32))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize_fp8(model, CUDA)
    weight = 2048 * 2048
    assert torch.cuda.memory_allocated() - before < 33 * weight
    assert torch.cuda.max_memory_allocated() - before < (32 + 16) * weight


@torch.inference_mode()
def on_gpu_vectors(model: Any, rows: Any) -> Tensor:
    """(B, D) float32: each text's mean, texts one at a time, through transformers' own bidirectional attention."""
    model.to(CUDA)
    hidden = [
        model(input_ids=torch.tensor([row.token_ids], device=CUDA), is_causal=False, use_cache=False).last_hidden_state
        for row in rows
    ]
    return torch.cat([text.float().mean(1) for text in hidden])
