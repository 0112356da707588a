"""int8 layers against the exact products of the same numbers, and encoders that have them against those without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model_store.build.calibration import largest_inputs, write_calibration
from model_store.encoder.encoder import Encoder
from model_store.encoder.int8 import (
    EmulatedInt8Linear,
    Int8Linear,
    in_steps,
    quantize_int8,
    smoothing_factors,
)
from model_store.encoder.packing import PackedBatch
from model_store.encoder.quantization import QuantizationError, linears_of
from model_store.manifest import CALIBRATION_FILE, quantized_space
from tests.tiny import FAMILIES, build_tiny, normalized, random_rows, tiny_model

CPU = torch.device("cpu")


def lacks_products() -> str:
    try:
        quantize_int8(tiny_model("llama"), CPU, {})
    except QuantizationError as error:
        return str(error)
    return ""


needs_products = pytest.mark.skipif(bool(reason := lacks_products()), reason=reason or "never")


def layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def tokens(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, T, K), with a few columns 30 times as large as the rest: decoders have such outliers."""
    x = torch.randn(1, count, width, generator=torch.Generator().manual_seed(count))
    x[..., :: width // 4] *= 30
    return x.to(dtype)


def largest(x: Tensor) -> Tensor:
    return x.flatten(0, -2).abs().amax(0).float()


def expected(linear: nn.Linear, x: Tensor) -> Tensor:
    """The product of the numbers that the layer rounds to, in float64."""
    factors = smoothing_factors(linear.weight, largest(x))
    (weight, weight_scale), (steps, scale) = in_steps(linear.weight * factors), in_steps(x * (1 / factors))
    product = (steps.double() @ weight.double().t()) * weight_scale[:, 0].double() * scale.double()
    return product if linear.bias is None else product + linear.bias.double()


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (40, 50), (2048, 640)])
@pytest.mark.parametrize("count", [1, 33])
def test_a_layer_gives_the_exact_product_of_its_8_bit_numbers(
    inputs: int, outputs: int, bias: bool, count: int, dtype: torch.dtype
) -> None:
    linear, x = layer(inputs, outputs, dtype, bias), tokens(count, inputs, dtype)
    out = Int8Linear(linear, largest(x))(x)
    assert (out.shape, out.dtype) == ((1, count, outputs), dtype)
    exact = expected(linear, x)
    emulated = EmulatedInt8Linear(linear, largest(x))(x)
    assert (emulated.double() - exact).abs().max() <= max(1e-5, torch.finfo(dtype).eps) * exact.abs().max()
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@needs_products
def test_the_largest_numbers_do_not_saturate() -> None:
    linear = nn.Linear(4096, 16, bias=False).requires_grad_(False)
    linear.weight.fill_(3.0)
    x = torch.full((1, 2, 4096), 5.0)
    assert torch.allclose(Int8Linear(linear, largest(x))(x), torch.tensor(3.0 * 5.0 * 4096), rtol=1e-6)


def test_outliers_cost_less_with_the_factors() -> None:
    linear, x = layer(256, 96, torch.float32), tokens(64, 256)[0]

    def error(inputs: Tensor) -> float:
        return float((EmulatedInt8Linear(linear, inputs)(x) - linear(x)).norm())

    as_large_as_weights = linear.weight.abs().amax(0)  # factors that are all nearly 1
    assert error(largest(x)) < 0.6 * error(as_large_as_weights)


@needs_products
def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_stays_in_its_row() -> None:
    x = tokens(4, 64)
    int8 = Int8Linear(layer(64, 96, torch.float32, bias=False), largest(x))
    x[0, 1] = 0
    x[0, 2, 5] = float("nan")
    x[0, 3, 5] = float("inf")
    for run in (int8, torch.compile(int8, fullgraph=True, dynamic=True)):
        out = run(x)[0]
        assert out[0].isfinite().all()
        assert (out[1] == 0).all()
        assert not out[2:].isfinite().any()


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """On every CPU: sums of integers are exact in any order."""
    x = tokens(300, 640, dtype)
    int8 = Int8Linear(layer(640, 96, dtype), largest(x))
    among = int8(x)
    for start, end in ((0, 1), (7, 8), (7, 30)):
        assert torch.equal(int8(x[:, start:end]), among[:, start:end])


@needs_products
def test_one_graph_serves_every_number_of_tokens() -> None:
    x = tokens(300, 64, torch.bfloat16)
    int8 = Int8Linear(layer(64, 96, torch.bfloat16), largest(x))
    torch._dynamo.reset()
    compiled = torch.compile(int8, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (16, 2, 300):
            found, plain = compiled(x[:, :count]).float(), int8(x[:, :count]).float()
            assert (found - plain).abs().max() <= 2**-7 * plain.abs().max()


@needs_products
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_encoder_of_every_family(tmp_path: Path, family: str) -> None:
    build_tiny(tmp_path / "encoder", family)
    plain, int8 = (Encoder.load(tmp_path / "encoder", "cpu", quantization=kind) for kind in ("none", "int8"))
    replaced = [module for module in int8.model.modules() if isinstance(module, Int8Linear)]
    left = linears_of(int8.model)
    assert len(left) == 4, "query, key and value are one product, and so are gate and up"
    assert len({name.split(".")[1] for name in left}) == 1, "of three layers, the worst one stays"
    assert len(replaced) == 8
    batch = PackedBatch.pack(random_rows([1, 3, 17, 40, 70, 9]), "mean")
    before = normalized(plain.encode(batch))
    for pack in (False, True):
        if pack:
            int8.pack_weights()
        cosines = (before * normalized(int8.encode(batch))).sum(1)
        # 0.9996 was the lowest seen (AMD EPYC), whatever the family.
        assert cosines.min() > 0.998
        assert cosines.max() < 1 - 1e-7, "nothing was rounded"


def test_the_calibration_is_of_all_texts(tmp_path: Path) -> None:
    encoder = Encoder.of(tiny_model("llama"), build_tiny(tmp_path / "encoder"), CPU)
    rows = random_rows([20, 40, 70])
    first, *others = [largest_inputs(encoder, [row]) for row in rows]
    for found in others:
        first = {name: torch.maximum(most, found[name]) for name, most in first.items()}
    together = largest_inputs(encoder, rows)
    assert together.keys() == first.keys()
    assert all(torch.allclose(together[name], most, rtol=1e-4) for name, most in first.items())


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_the_layer_that_loses_most_stays(tmp_path: Path, worst: int) -> None:
    encoder = Encoder.of(tiny_model("llama"), build_tiny(tmp_path / "encoder"), CPU)
    for number, layer in enumerate(encoder.model.layers):
        if number != worst:  # what it adds to a token's state, and so its error, becomes small
            layer.mlp.down_proj.weight *= 0.01
            layer.self_attn.o_proj.weight *= 0.01
    write_calibration(encoder, random_rows([5, 30]), tmp_path)
    assert {name.split(".")[1] for name in load_file(tmp_path / CALIBRATION_FILE)} == {"0", "1", "2"} - {str(worst)}
    assert not any(isinstance(module, EmulatedInt8Linear) for module in encoder.model.modules())


def test_a_folder_without_a_calibration_is_refused_with_the_way_out(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder")
    (tmp_path / "encoder" / CALIBRATION_FILE).unlink()
    with pytest.raises(
        QuantizationError, match="remove the folder and build it again, or set LLM2VEC_QUANTIZATION=none"
    ):
        Encoder.load(tmp_path / "encoder", "cpu", quantization="int8")


def test_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(QuantizationError, match=r"the device is cuda:0: set LLM2VEC_QUANTIZATION=fp8 or none"):
        quantize_int8(tiny_model("llama"), torch.device("cuda", 0), {})


def test_int8_vectors_are_of_another_space() -> None:
    assert quantized_space("0123456789abcdef", "int8") == "0123456789abcdef-int8"
