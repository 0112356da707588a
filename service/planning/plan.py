"""What to expect of an encoder on a GPU: tokens a second, latencies, memory, and how many GPUs a load needs.

Weights and products are counted; peaks and bandwidths are the vendors'. The share of them that a forward pass reaches
is assumed, as no server has been timed on these GPUs yet; each figure names its basis. The waiting time of queries
comes from a simulation of the server's own policy. It knows nothing of the network, and uses no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil
from typing import Literal

import numpy as np

from model_store.shape import WEIGHT_BYTES, Arithmetic, Shape
from service.batching.cost_model import CostModel
from service.planning.gpus import Gpu, PlanError, gpus
from service.planning.simulation import LEAD_SECONDS, Client, Lanes, percentile, simulate
from service.settings import BATCH_SECONDS, TOKEN_BUDGET

Basis = Literal["counted", "data sheet", "assumed", "given", "measured", "simulated"]

# Shares of the dense peak that large batches of compiled layers reach on an H100, by the model's width: estimates for
# 270M, 1.3B and 8B parameters. Narrow products fill the matrix units less, and take less of the whole time.
_SHARE_OF_PEAK = {640: 0.26, 2048: 0.54, 4096: 0.60}

# In fp8 twice the peak is estimated to give 1.4 times the tokens.
_FP8_SHARE = 0.7

# The share of the bandwidth reached in reading weights, and the further time that each layer costs any batch.
_BANDWIDTH_SHARE = 0.9
_LAYER_SECONDS = 25e-6

# The CUDA context, and memory that torch's allocator keeps and can't use.
_CONTEXT_BYTES = 1_000_000_000

# Lengths of a plan without a load: the texts that a server times itself with at the start, and a usual query.
TEXT_TOKENS = 128
QUERY_TOKENS = 28

# Single queries a second through HTTP on one core of the benchmarks' machine (bench/results/http_path.json), and the
# share of a core that a plan uses.
_QUERIES_PER_CORE = 3517
_CORE_SHARE = 0.7

# Queries in a simulation; the share of the required p99 that they may reach; the caps that are tried. Beyond 80 %,
# queues would grow without end if the load or the rate were a little off the plan.
_QUERIES = 20_000
_P99_SHARE = 0.9
_CAPS = [percent / 100 for percent in range(5, 85, 5)]

_SCALES = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")]
_SIZES = {"bytes": "B", "FLOP": "FLOP", "FLOP/s": "FLOP/s"}

_OF_MEMORY: dict[str, Basis] = {"weights": "counted", "activations": "counted", "besides": "assumed"}


@dataclass(frozen=True)
class Bulk:
    """A bulk job: `texts` texts of `tokens` tokens each, within `within` seconds."""

    texts: int
    tokens: int
    within: float


@dataclass(frozen=True)
class Serving:
    """Queries that come at random, with 99 % of them answered in `p99` seconds of queue and device."""

    per_second: float
    tokens: int = QUERY_TOKENS
    p99: float = 0.1


@dataclass(frozen=True)
class Asked:
    """The question that a plan answers; `efficiency` and `timed` replace the assumptions.

    `timed` holds the figures that a server logged as `calibrated` at its start: tokens a second, and seconds of the
    smallest batch. `price` is the price of a GPU-hour, in any currency.
    """

    bulk: Bulk | None = None
    serving: Serving | None = None
    quantization: Literal["none", "fp8"] = "none"
    efficiency: float | None = None
    timed: tuple[float, float] | None = None
    token_budget: int = TOKEN_BUDGET["cuda"]
    batch_seconds: float = BATCH_SECONDS["cuda"]
    dimensions: int | None = None
    price: float | None = None

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest text: the plan takes the attention cost of a token in such a text for every token."""
        return max((load.tokens for load in (self.bulk, self.serving) if load), default=TEXT_TOKENS)


@dataclass(frozen=True)
class Figure:
    """One line of a plan; `unit` is that of `value`."""

    name: str
    value: float
    unit: str
    basis: Basis

    @property
    def text(self) -> str:
        return readable(self.value, self.unit)


def memory_needed(shape: Shape, arithmetic: Arithmetic, token_budget: int) -> dict[str, int]:
    """Bytes of the weights, of a batch of the whole token budget, and of the memory that CUDA and torch keep."""
    return {
        "weights": shape.weight_bytes(arithmetic),
        "activations": shape.activation_bytes(token_budget, arithmetic),
        "besides": _CONTEXT_BYTES,
    }


class Plan:
    """One kind of GPU for one model and load.

    Raises:
        PlanError: if the model or a batch does not fit on this GPU, or the latency can't be reached.
    """

    def __init__(self, shape: Shape, gpu: Gpu, asked: Asked) -> None:
        self.shape, self.gpu, self.asked = shape, gpu, asked
        self.arithmetic = gpu.arithmetic(asked.quantization)
        if asked.text_tokens > min(shape.max_positions, asked.token_budget):
            limit = f"the model reads {shape.max_positions} tokens and a batch has {asked.token_budget}"
            raise PlanError(f"{limit}: texts of {asked.text_tokens} have to be cut or sent in chunks")
        self.memory = memory_needed(shape, self.arithmetic, asked.token_budget)
        self._require_memory()
        self.cost = self._cost()
        self.batch_tokens = max(self.cost.batch_tokens(asked.batch_seconds, asked.token_budget), asked.text_tokens)
        self.tokens_per_second = self.batch_tokens / self.cost.seconds(self.batch_tokens)

    @property
    def basis(self) -> Basis:
        return "measured" if self.asked.timed else "given" if self.asked.efficiency else "assumed"

    @property
    def share_of_peak(self) -> float:
        """The share of the data sheet's dense peak that all products reach."""
        peak, timed = self.gpu.peaks[self.arithmetic], self.asked.timed
        if timed:
            return self.shape.flops_per_token(TEXT_TOKENS) * timed[0] / peak
        assumed = float(np.interp(self.shape.width, list(_SHARE_OF_PEAK), list(_SHARE_OF_PEAK.values())))
        return self.asked.efficiency or assumed * (_FP8_SHARE if self.arithmetic == "fp8" else 1)

    @property
    def lone_seconds(self) -> float:
        """Seconds of a single query on an idle device."""
        return self.cost.seconds(self.asked.serving.tokens if self.asked.serving else QUERY_TOKENS)

    def _cost(self) -> CostModel:
        peak = self.gpu.peaks[self.arithmetic]
        base = _LAYER_SECONDS * self.shape.layers
        weights = self.shape.linear_parameters * WEIGHT_BYTES[self.arithmetic]
        floor = base + weights / (_BANDWIDTH_SHARE * self.gpu.bandwidth)
        if self.asked.timed:
            floor = self.asked.timed[1]
        per_token = self.shape.flops_per_token(self.asked.text_tokens) / (self.share_of_peak * peak)
        return CostModel(floor, min(base, floor), per_token)

    def _require_memory(self) -> None:
        memory, gpu, shape, budget = self.memory, self.gpu, self.shape, self.asked.token_budget
        if sum(memory.values()) <= gpu.memory:
            return
        ways = []
        left = gpu.memory - memory["weights"] - memory["besides"]
        fits = int(left / shape.activation_bytes(1, self.arithmetic)) // 1024 * 1024
        if fits >= max(self.asked.text_tokens, 1024):
            ways.append(f"--token-budget {fits} (LLM2VEC_TOKEN_BUDGET)")
        if "fp8" in gpu.peaks and sum(memory_needed(shape, "fp8", budget).values()) <= gpu.memory:
            ways.append("--quantization fp8")
        if larger := [other.key for other in gpus().values() if self._fits(other)]:
            ways.append(f"--gpu {', '.join(larger)}")
        parts = ", ".join(f"{name} {readable(size, 'bytes')}" for name, size in memory.items())
        raise PlanError(
            f"{gpu.name} has {readable(gpu.memory, 'bytes')}, and {readable(sum(memory.values()), 'bytes')} are "
            f"needed ({parts}): use {' or '.join(ways) or 'a smaller model, as one is not spread over several GPUs'}"
        )

    def _fits(self, other: Gpu) -> bool:
        try:
            arithmetic = other.arithmetic(self.asked.quantization)
        except PlanError:
            return False
        return sum(memory_needed(self.shape, arithmetic, self.asked.token_budget).values()) <= other.memory

    @property
    def utilization_cap(self) -> float:
        """The highest share of the device's rate, in steps of 5 % up to 80 %, at which queries keep their p99."""
        return self._cap[0]

    @property
    def p99_at_cap(self) -> float:
        """The p99 of queries at that share, in seconds."""
        return self._cap[1]

    @cached_property
    def _cap(self) -> tuple[float, float]:
        """The cap and its p99, by simulation of the server's policy. A bulk job, if any, keeps the device busy."""
        serving = self.asked.serving
        assert serving is not None
        p99_at = cache(self.simulated_p99)
        kept = bisect_left(_CAPS, True, key=lambda cap: p99_at(cap) > _P99_SHARE * serving.p99)
        if kept:
            return _CAPS[kept - 1], p99_at(_CAPS[kept - 1])
        least, alone, full = p99_at(_CAPS[0]), self.lone_seconds, self.cost.seconds(self.batch_tokens)
        raise PlanError(
            f"99 % of queries in {readable(serving.p99, 's')} can't be had on {self.gpu.name}: at {_CAPS[0]:.0%} of "
            f"its rate it is {readable(least, 's')} already, a query takes {readable(alone, 's')} alone and a full "
            f"batch {readable(full, 's')}: allow more with --p99, or take a faster GPU"
            + (", smaller batches (--batch-seconds) or other GPUs for bulk" if self.asked.bulk else "")
        )

    def simulated_p99(self, utilization: float, queries: int = _QUERIES, seed: int = 0) -> float:
        """The p99 of queries in seconds, from arrival to vector, if they take this share of the device's rate."""
        asked = self.asked
        assert asked.serving is not None
        per_second = utilization / self.cost.per_token / asked.serving.tokens
        bulk = (Client(256, spread(asked.bulk.tokens)),) * 2 if asked.bulk else ()
        policy = Lanes(self.batch_tokens, LEAD_SECONDS)
        span = queries / per_second
        outcome = simulate(policy, self.cost, per_second, bulk, span, seed, spread(asked.serving.tokens))
        return percentile(outcome.queries, 99) or 0.0

    @property
    def bulk_gpu_seconds(self) -> float:
        bulk = self.asked.bulk
        return bulk.texts * bulk.tokens / self.tokens_per_second if bulk else 0.0

    @property
    def gpus(self) -> int:
        """How many GPUs are needed, with none to spare."""
        asked, busy, at_least = self.asked, 0.0, 1
        if asked.bulk:
            busy += self.bulk_gpu_seconds / asked.bulk.within
        if asked.serving:
            tokens = asked.serving.per_second * asked.serving.tokens
            busy += tokens / self.tokens_per_second
            at_least = ceil(tokens * self.cost.per_token / self.utilization_cap)
        return max(ceil(busy), at_least)

    @property
    def utilization(self) -> float:
        """The share of each GPU's rate that queries take, with this number of GPUs."""
        serving = self.asked.serving
        return serving.per_second * serving.tokens * self.cost.per_token / self.gpus if serving else 0.0

    def figures(self) -> list[Figure]:
        shape, cost, basis = self.shape, self.cost, self.basis
        found = [
            Figure("parameters", shape.parameters, "", "counted"),
            Figure("flops_per_token", shape.flops_per_token(self.asked.text_tokens), "FLOP", "counted"),
            *(Figure(f"memory_{name}", size, "bytes", _OF_MEMORY[name]) for name, size in self.memory.items()),
            Figure("memory_of_gpu", self.gpu.memory, "bytes", "data sheet"),
            Figure("peak", self.gpu.peaks[self.arithmetic], "FLOP/s", "data sheet"),
            Figure("share_of_peak", self.share_of_peak, "share", basis),
            Figure("tokens_per_second", self.tokens_per_second, "tokens/s", basis),
            Figure("batch_tokens", self.batch_tokens, "tokens", basis),
            Figure("batch_seconds", cost.seconds(self.batch_tokens), "s", basis),
            Figure("lone_query_seconds", self.lone_seconds, "s", basis),
        ]
        if self.asked.bulk:
            found += self._bulk_figures(self.asked.bulk)
        if self.asked.serving:
            found += self._serving_figures(self.asked.serving)
        if self.asked.bulk or self.asked.serving:
            found.append(Figure("GPUs", self.gpus, "", basis))
            if self.asked.price is not None:
                found.append(Figure("price_per_hour", self.gpus * self.asked.price, "", "given"))
        return found

    def _bulk_figures(self, bulk: Bulk) -> list[Figure]:
        hours, dimensions = self.bulk_gpu_seconds / 3600, self.asked.dimensions or self.shape.width
        found = [
            Figure("bulk_tokens", bulk.texts * bulk.tokens, "", "counted"),
            Figure("bulk_gpu_hours", hours, "hours", self.basis),
            *(
                Figure(f"vectors_{name}", bulk.texts * dimensions * size, "bytes", "counted")
                for name, size in (("float32", 4), ("int8", 1), ("binary", 1 / 8))
            ),
        ]
        if self.asked.price is not None:
            found.append(Figure("bulk_price", hours * self.asked.price, "", "given"))
        return found

    def _serving_figures(self, serving: Serving) -> list[Figure]:
        cap = self.utilization_cap
        cores = serving.per_second / (_QUERIES_PER_CORE * _CORE_SHARE)
        return [
            Figure("utilization_cap", cap, "share", "simulated"),
            Figure("queries_per_second_and_gpu", cap / self.cost.per_token / serving.tokens, "", self.basis),
            Figure("p99_at_cap", self.p99_at_cap, "s", "simulated"),
            Figure("utilization", self.utilization, "share", self.basis),
            Figure("http_cores", ceil(cores), "", "measured"),
        ]

    def assumptions(self) -> list[str]:
        speed = {
            "assumed": f"{self.share_of_peak:.0%} of the data sheet's peak in large batches, {_BANDWIDTH_SHARE:.0%} of "
            f"its bandwidth for weights, {_LAYER_SECONDS * 1e6:.0f} µs a layer besides: estimates, as no GPU has been "
            "timed yet. --timed puts your server's own calibration in their place",
            "given": f"{self.share_of_peak:.0%} of the data sheet's peak, as given; the rest is assumed",
            "measured": "speeds follow a server's calibration",
        }[self.basis]
        found = [f"{self.gpu.name}: {self.gpu.source}", speed]
        if self.arithmetic == "float32":
            found.append("no bfloat16 on this GPU: set LLM2VEC_DTYPE=float32")
        found.append("memory: a batch of the whole token budget, plus 1 GB assumed for CUDA and torch")
        if self.asked.serving:
            found.append("p99: queue and device only, queries at random; HTTP, tokenizing and the network come on top")
            found.append(
                f"HTTP: {_QUERIES_PER_CORE} queries a second on one core measured, {_CORE_SHARE:.0%} of it used"
            )
        return found


def readable(value: float, unit: str) -> str:
    """A figure for people: three digits or a whole number, with a unit if the figure's name does not say it."""
    if unit in _SIZES:
        scale, prefix = next(((scale, prefix) for scale, prefix in _SCALES if value >= scale), (1.0, ""))
        return f"{_digits(value / scale)} {prefix}{_SIZES[unit]}"
    if unit == "s":
        return f"{_digits(value)} s" if value >= 1 else f"{_digits(value * 1000)} ms"
    if unit == "share":
        return f"{value:.0%}"
    return _digits(value)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def spread(tokens: int) -> tuple[int, int]:
    """The shortest and the longest length, for texts of this mean length."""
    return max(tokens // 2, 1), tokens + tokens // 2
