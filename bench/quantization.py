"""What 8-bit layers cost in fidelity and give in speed on a CPU, on a real encoder; bench.gpu has them on a GPU.

    python -m bench.quantization [--model DIR|RECIPE] [--texts 48] [--rounds 3] [--save]

Fidelity is the cosine of each text's vector to the bfloat16 one. Everybody encodes the same batches in turn, round by
round; what counts are the ratios.

    bfloat16          what the others are compared with
    fp8_emulated      model_store.encoder.quantization's slow twin: its vectors count, its speed is not measured
    int8_rowwise      made as fp8 is: one scale for each token and each output, torch._int_mm
    int8_rowwise_mlp  the same in the MLPs only

Everybody computes on one core, and what counts is that core's time: other work on the machine then takes nothing from a
kind that is made of many small steps. A quantisation is worth having if it is faster than bfloat16 and
no text's cosine is below 0.995.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.cpu import pack
from bench.products import relative_speeds
from bench.report import finish, options_of
from bench.server import stored
from bench.texts import mixed_texts, tokenized
from model_store.encoder.encoder import Encoder
from model_store.encoder.quantization import emulate_fp8, replace_linears

# T packed tokens, K inputs and N outputs of a layer

_WORTH_COSINE = 0.995


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", texts=48, rounds=3)
    folder, manifest = stored(options.model)
    torch.set_num_threads(1)
    encoders = {
        name: Encoder.load(folder, "cpu", "bfloat16")
        for name in ("bfloat16", "fp8_emulated", "int8_rowwise", "int8_rowwise_mlp")
    }
    emulate_fp8(encoders["fp8_emulated"].model)
    replace_linears(encoders["int8_rowwise"].model, Int8Linear)
    replace_linears(encoders["int8_rowwise_mlp"].model, Int8Linear, ".mlp.")
    batches = pack(tokenized(mixed_texts(options.texts), folder), manifest.pooling)
    vectors = {name: torch.cat([encoder.encode(batch) for batch in batches]) for name, encoder in encoders.items()}
    cosines = {name: torch.cosine_similarity(found, vectors["bfloat16"]) for name, found in vectors.items()}
    near = {name: {"mean": round(float(c.mean()), 5), "min": round(float(c.min()), 5)} for name, c in cosines.items()}
    del encoders["fp8_emulated"]
    ratios = relative_speeds(encoders, batches, options.rounds)
    result = {
        "model": manifest.name,
        "device": "cpu, one core",
        "texts": options.texts,
        "tokens": sum(len(batch.token_ids) for batch in batches),
        "cosine_to_bfloat16": near,
        "ratio_to_bfloat16": ratios,
        "worth_having": [name for name in ratios if ratios[name] > 1 and near[name]["min"] >= _WORTH_COSINE],
    }
    finish("quantization", result, options.save)


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


if __name__ == "__main__":
    main()
