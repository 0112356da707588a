"""What 8-bit layers cost in fidelity and give in speed on a CPU, on a real encoder; bench.gpu has them on a GPU.

    python -m bench.quantization [--model DIR|RECIPE] [--texts N] [--rounds N] [--sts FILE] [--pairs N] [--save]

Fidelity: cosine of each text's vector to the bfloat16 one; with --sts also Spearman's correlation over the same pairs.
Everybody encodes the same batches in turn, round by round; what counts are the ratios.

    bfloat16          what the others are compared with
    fp8_emulated      model_store.encoder.quantization's slow twin: its vectors count, its speed is not measured
    fp8_emulated_mlp  the same in the MLPs only
    float32           a ruler: how far bfloat16 itself is from it
    int8_dynamic      torch.ao's: one scale for the whole input, one for each output of the weight
    int8_rowwise      made as fp8 is: one scale for each token and each output, torch._int_mm
    int8_rowwise_mlp  the same in the MLPs only

Everybody computes on one core, and what counts is that core's time: other work on the machine then takes nothing from a
kind that is made of many small steps. A quantisation is worth having if it is faster than bfloat16 and
no text's cosine is below 0.995. `product_us` is one product alone, with the largest layer's weight and 16 or 512
tokens; it adds int8 weights with a bfloat16 input.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from bench.cpu import pack
from bench.report import finish, options_of, ratio, seconds_of, tell
from bench.server import stored
from bench.texts import mixed_texts, tokenized
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.quantization import EmulatedFp8Linear, emulate_fp8, replace_linears
from model_store.evaluation.sts import evaluate_sts, read_pairs
from model_store.manifest import Manifest

# T packed tokens, K inputs and N outputs of a layer

_WORTH_COSINE = 0.995
_LONE_QUERY = "how much protein should a female eat a day"
_PRODUCT_TOKENS = (16, 512)


def main() -> None:
    """Measure and report."""
    parser = options_of(__doc__, model=True)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sts", type=Path, help="a file of scored pairs: tab-separated score, sentence1, sentence2")
    parser.add_argument("--pairs", type=int, default=200, help="so many of them, drawn at random")
    options = parser.parse_args()

    folder, manifest = stored(options.model)
    encoders = load_all(folder)
    torch.set_num_threads(1)
    batches = batches_of(folder, manifest, mixed_texts(options.texts))
    lone = batches_of(folder, manifest, [_LONE_QUERY])[0]

    bfloat16 = encode(encoders["bfloat16"], batches)
    cosines = {name: torch.cosine_similarity(encode(encoder, batches), bfloat16) for name, encoder in encoders.items()}
    spearman = sts(folder, manifest, encoders, options.sts, options.pairs) if options.sts else {}
    for name in [name for name in encoders if "emulated" in name]:
        del encoders[name]
    products = product_times(encoders["bfloat16"])
    rates, lone_ms = speeds(encoders, batches, lone, options.rounds)
    ratios = {name: ratio(found, rates["bfloat16"]) for name, found in rates.items()}
    near = {name: {"mean": round(float(c.mean()), 5), "min": round(float(c.min()), 5)} for name, c in cosines.items()}
    int8 = [name for name in cosines if name.startswith("int8")]
    result = {
        "model": manifest.name,
        "device": "cpu, one core",
        "texts": options.texts,
        "tokens": sum(len(batch.token_ids) for batch in batches),
        "cosine_to_bfloat16": near,
        "sts_spearman": spearman,
        "tokens_per_second": {name: round(median(found)) for name, found in rates.items()},
        "ratio_to_bfloat16": ratios,
        "lone_query_ms": lone_ms,
        "product_us": products,
        "worth_having": [name for name in int8 if ratios[name] > 1 and cosines[name].min() >= _WORTH_COSINE],
    }
    finish("quantization", result, options.save)


def load_all(folder: Path) -> dict[str, Encoder]:
    """Every kind, under the names above."""

    def made(change: Callable[[nn.Module], object], dtype: Literal["bfloat16", "float32"] = "bfloat16") -> Encoder:
        encoder = Encoder.load(folder, "cpu", dtype)
        change(encoder.model)
        return encoder

    def emulated(linear: nn.Linear) -> nn.Module:
        return EmulatedFp8Linear(linear, torch.device("cpu"))

    return {
        "bfloat16": made(lambda model: None),
        "fp8_emulated": made(emulate_fp8),
        "fp8_emulated_mlp": made(lambda model: replace_linears(model, emulated, ".mlp.")),
        "int8_rowwise": made(lambda model: replace_linears(model, Int8Linear)),
        "int8_rowwise_mlp": made(lambda model: replace_linears(model, Int8Linear, ".mlp.")),
        "float32": made(lambda model: None, "float32"),
        "int8_dynamic": made(lambda model: replace_linears(model, torch_dynamic_int8), "float32"),
    }


def encode(encoder: Encoder, batches: Sequence[PackedBatch]) -> Tensor:
    """(B, D) vectors of all batches."""
    return torch.cat([encoder.encode(batch) for batch in batches])


def speeds(
    encoders: dict[str, Encoder], batches: Sequence[PackedBatch], lone: PackedBatch, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """By kind: tokens a second in each round, and milliseconds of a lone query, of everybody in turn."""
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    lone_seconds: dict[str, list[float]] = {name: [] for name in encoders}
    tokens = sum(len(batch.token_ids) for batch in batches)
    for number in range(rounds + 1):
        for name, encoder in encoders.items():
            rate = tokens / core_seconds(encode, encoder, batches)
            queries = [core_seconds(encoder.encode, lone) for _ in range(10)]
            if number:  # the first round warms up
                rates[name].append(rate)
                lone_seconds[name] += queries
                tell(name, {"round": number, "tokens_per_second": round(rate)})
    return rates, {name: round(1000 * median(found), 2) for name, found in lone_seconds.items()}


def core_seconds(run: Callable[..., object], *arguments: object) -> float:
    """How long a call takes of this process's time."""
    return seconds_of(partial(run, *arguments), time.process_time)


class Int8Linear(nn.Module):
    """The CPU's counterpart of Fp8Linear: int8 × int8 → int32, scales as there."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, scale = int8_rows(linear.weight.detach())
        self.weight_scale = scale.t().contiguous()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        x8, scale = int8_rows(x.flatten(0, -2))
        out = (torch._int_mm(x8, self.weight.t()) * scale * self.weight_scale).to(x.dtype)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) → int8 (R, K) and float32 scales (R, 1)."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / 127).clamp(min=1e-12)
    return (x / scale).round().to(torch.int8), scale


def torch_dynamic_int8(linear: nn.Linear) -> nn.Module:
    """torch.ao's dynamically quantised layer, float32 in and out."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao, which is a package more
        made: nn.Module = quantize_dynamic(nn.Sequential(linear), {nn.Linear: per_channel_dynamic_qconfig})[0]
    return made


def batches_of(folder: Path, manifest: Manifest, texts: Sequence[str]) -> list[PackedBatch]:
    """The texts in their order."""
    return pack(tokenized(texts, folder), manifest.pooling)


@torch.inference_mode()
def product_times(encoder: Encoder) -> dict[str, dict[str, float]]:
    """Microseconds of the fastest of some products with the largest layer's weight, by number of tokens."""
    linears = [module for module in encoder.model.layers.modules() if isinstance(module, nn.Linear)]
    largest = max(linears, key=lambda linear: linear.weight.numel())
    rowwise = Int8Linear(largest)
    scales = rowwise.weight_scale[0].bfloat16()
    dynamic = torch_dynamic_int8(nn.Linear(largest.in_features, largest.out_features))
    times: dict[str, dict[str, float]] = {}
    for count in _PRODUCT_TOKENS:
        x = torch.randn(count, largest.in_features).bfloat16()
        times[str(count)] = {
            "bfloat16": fastest(largest, x),
            "int8_dynamic": fastest(dynamic, x.float()),
            "int8_rowwise": fastest(rowwise, x),
            "int8_rowwise, of an input in int8": fastest(torch._int_mm, int8_rows(x)[0], rowwise.weight.t()),
            "int8_weights": fastest(torch._weight_int8pack_mm, x, rowwise.weight, scales),
        }
    return times


def fastest(run: Callable[..., object], *arguments: Tensor) -> float:
    """Microseconds of the core; the least of 30, because others' work on the machine only adds."""
    return round(1e6 * min(core_seconds(run, *arguments) for _ in range(30)))


def sts(folder: Path, manifest: Manifest, encoders: dict[str, Encoder], file: Path, count: int) -> dict[str, float]:
    """Spearman's correlation by kind, over the same pairs."""
    pairs = read_pairs(file)
    pairs = random.Random(0).sample(pairs, min(count, len(pairs)))
    batches = batches_of(folder, manifest, [text for pair in pairs for text in (pair.first, pair.second)])
    found = {}
    for name, encoder in encoders.items():
        vectors = nn.functional.normalize(encode(encoder, batches), dim=1)
        found[name] = round(evaluate_sts(pairs, vectors.numpy()), 4)
    return found


if __name__ == "__main__":
    main()
