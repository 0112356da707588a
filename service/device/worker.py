"""One thread gives all work to the device: loading, warm-up and packed batches. A second thread takes the results.

If `run_batch` raises, the whole batch failed. This module knows nothing of HTTP, text or queues.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.build.self_test import (
    check_attention,
    check_equal_bits,
    check_same_vectors,
    compile_checked,
    pack_checked,
    upgrade_flash_checked,
)
from model_store.encoder.devices import choose_device
from model_store.encoder.encoder import Encoder
from model_store.encoder.pipeline import Pending, Pipeline, Replay, graph_sizes
from model_store.encoder.pooling import Wanted
from model_store.encoder.roofline import gemm_flops_per_second
from model_store.shape import Shape
from model_store.text.tokenizer import TokenizedText
from service.batching.contract import DevicePlan
from service.batching.cost_model import CostModel, fit
from service.batching.limits import Limits
from service.embedding.rows import EmbedRow, Vector
from service.errors import DeviceLost, EncodingError, NonFiniteEmbedding, OutOfMemory, StartupError
from service.logs import log, unexplained
from service.metrics import Metrics
from service.settings import Settings, Switch

# The batches timed at the start, in tokens; the longest text in them; and the time that they may take together.
_TIMED_TOKENS = (16, 64, 256, 1024, 4096, 16384)
_TIMED_TEXT_TOKENS = 128
_TIMING_SECONDS = 4.0

# The time that a thread's wake-up and a timer's grain may add to the host's time for a batch.
_SLACK_SECONDS = 1e-3

# The forward pass is captured for batches of up to the first of these sizes. The next size is captured too, as long as
# the host needs at least this share of a batch's time to give it to the device.
_GRAPH_TOKENS = (512, 1024, 2048, 4096)
_HOST_BOUND = 0.8

# The cores that torch would use, before any thread is told otherwise.
_CORES = torch.get_num_threads()

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

# Share of the newest batch in running averages.
_NEWEST = 0.1


def leave_cores_to_device_thread() -> None:
    """Let torch use one core in this thread, and in those to come but for the device thread.

    OpenMP keeps threads for every thread that has ever computed on several cores. When they outnumber the cores, they
    sleep after each operation: a lone query took 1.25 to 1.4 times as long after one product on another thread.
    """
    torch.set_num_threads(1)


class EncoderWorker:
    """An encoder with a device thread of its own."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self._folder = folder
        self._settings = settings
        self._metrics = metrics
        self._device_thread = ThreadPoolExecutor(1, "device")
        self._result_thread = ThreadPoolExecutor(1, "results")
        self._pipeline: Pipeline
        self._last_ended = 0.0
        self._of_late = dict.fromkeys(("seconds", "flops", "tokens"), 0.0)

    async def start(self, limits: Limits) -> DevicePlan:
        """Load the encoder, check it, speed it up and time it. On CUDA also check that the whole token budget fits.

        Raises:
            ValueError: a DeviceError, AttentionError, SelfTestError or StoreError that says what to change.
            StartupError: if a fast path is switched on that can't work here.
            OutOfMemory: if the token budget does not fit beside the weights.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._result_thread, self._use_device)
        return await loop.run_in_executor(self._device_thread, self._start, limits)

    async def run_batch(self, rows: list[EmbedRow]) -> Sequence[Vector | EncodingError]:
        """For each row a float32 vector of the row's width, or the row's own error.

        Several calls may run at once; the device takes their batches in the order of the calls.

        Raises:
            OutOfMemory: if the batch needs more device memory than there is.
            DeviceLost: if the device can't compute any more.
        """
        loop = asyncio.get_running_loop()
        given = time.perf_counter()
        pending = await loop.run_in_executor(self._device_thread, self._launch, rows)
        if pending.copied is None:
            return self._finish(rows, pending, given)
        try:
            return await loop.run_in_executor(self._result_thread, self._finish, rows, pending, given)
        except RuntimeError:
            await loop.run_in_executor(self._device_thread, self._check_device)
            raise

    def stop(self) -> None:
        """Let the threads end after their current batches."""
        self._device_thread.shutdown(wait=True, cancel_futures=True)
        self._result_thread.shutdown(wait=True, cancel_futures=True)

    def _use_device(self) -> torch.device:
        """Make the device this thread's current device: the thread's streams, events and graphs belong to it."""
        device = choose_device(self._settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def _start(self, limits: Limits) -> DevicePlan:
        settings, metrics = self._settings, self._metrics
        if settings.equal_bits and settings.quantization == "int8" and settings.compile != "on":
            # torch's own activations compute a number in another way where a thread's part of a batch ends.
            raise StartupError("LLM2VEC_EQUAL_BITS with int8 needs compiled layers: set LLM2VEC_COMPILE=on")
        began = time.perf_counter()
        torch.set_num_threads(_CORES)
        device = self._use_device()
        # If partial sums were rounded to 16 bits, they would depend on how a product is split, and so on its number of
        # rows.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        encoder = Encoder.load(self._folder, str(device), settings.dtype, settings.attention, settings.quantization)
        check_attention(encoder)
        pack_checked(encoder, settings.equal_bits)
        self._newer_flash = upgrade_flash_checked(encoder) if settings.attention == "auto" else ""
        self._pipeline = Pipeline(encoder)
        loaded = time.perf_counter()
        metrics.model_load_seconds.set(loaded - began)
        self._switch_on("compile", settings.compile, _lacks_compiler(), partial(compile_checked, encoder))
        if settings.equal_bits:
            check_equal_bits(encoder)
        cost = self._calibrate(limits)
        self._switch_on("cuda_graphs", settings.cuda_graphs, self._lacks_graphs(), partial(self._capture, cost, limits))
        if device.type == "cuda":
            self._time(limits.token_budget, limits.max_input_tokens)
            cost = self._calibrate(limits)
        self._flops_per_second = gemm_flops_per_second(encoder.device, encoder.dtype)
        self._shape = Shape.read(encoder.model.config.to_dict())
        metrics.gemm_flops_per_second.set(self._flops_per_second)
        plan = self._plan(cost, limits)
        metrics.warmup_seconds.set(time.perf_counter() - loaded)
        metrics.batch_tokens_full.set(plan.limits.batch_tokens)
        for counted in (metrics.device_seconds, metrics.model_flops):
            counted.labels(self.device)
        self._watch_memory()
        return plan

    def _switch_on(self, name: str, switch: Switch, lacks: str, turn_on: Callable[[], None]) -> None:
        """Turn a fast path on. If it lacks anything or fails, `auto` leaves it off and `on` is a StartupError."""
        if switch == "off":
            return
        began = time.perf_counter()
        try:
            if lacks:
                raise StartupError(f"LLM2VEC_{name.upper()} needs {lacks}")
            turn_on()
        except Exception as error:
            if switch == "on":
                if fault := unexplained(error):
                    log.error("%s fails", name, exc_info=fault)
                raise StartupError(f"LLM2VEC_{name.upper()} is on but fails: {error}") from error
            log.info("%s is off: %s", name, error, exc_info=unexplained(error))
        else:
            log.info("%s is on", name, extra={"fields": {"seconds": round(time.perf_counter() - began, 2)}})

    def _lacks_graphs(self) -> str:
        encoder = self._pipeline.encoder
        if encoder.device.type != "cuda":
            return "CUDA"
        return "" if encoder.kernel != "sdpa" else "an attention kernel other than sdpa"

    def _capture(self, cost: CostModel, limits: Limits) -> None:
        """Capture graphs, check that they give the same vectors, and keep each where it saves time."""
        plain = self._pipeline
        captured = plain.with_graphs(graph_sizes(self._host_bound_up_to(limits)))
        check_same_vectors(plain, captured)
        faster = []
        for replay in captured.replays:
            tokens = replay.graph.tokens
            longest = min(tokens, limits.max_input_tokens)
            saved = self._time(tokens, longest) - self._time(tokens, longest, Pipeline(plain.encoder, (replay,)))
            if saved > 0:
                faster.append(Replay(replay.graph, cost.least_tokens_worth(tokens, saved)))
        self._pipeline = Pipeline(plain.encoder, tuple(faster))

    def _host_bound_up_to(self, limits: Limits) -> int:
        """The largest batch, in tokens, whose time may be spent mostly in the host's launches and not on the device."""
        most = _GRAPH_TOKENS[0]
        for tokens in _GRAPH_TOKENS[1:]:
            if tokens > limits.token_budget:
                break
            launched, whole = self._launch_seconds(tokens, limits.max_input_tokens)
            if launched < _HOST_BOUND * whole:
                break
            most = tokens
        return min(most, limits.token_budget)

    def _calibrate(self, limits: Limits) -> CostModel:
        """Time a few batches and fit the cost model to them."""
        measured: dict[int, float] = {}
        left = _TIMING_SECONDS
        for tokens in _TIMED_TOKENS:
            expected = 3 * max(measured.values(), default=0.0) * 4
            if tokens > limits.token_budget or (len(measured) > 1 and expected > left):
                break
            began = time.perf_counter()
            measured[tokens] = self._time(tokens, min(_TIMED_TEXT_TOKENS, limits.max_input_tokens))
            left -= time.perf_counter() - began
        try:
            return fit(measured)
        except ValueError:  # the limits allow too few sizes, or the model is too small, to see a rate
            tokens, seconds = max(measured.items())
            return CostModel(seconds, 0.0, seconds / tokens)

    def _plan(self, cost: CostModel, limits: Limits) -> DevicePlan:
        batch_limits = limits.for_batches(cost)
        full = batch_limits.batch_tokens
        fields = {
            "tokens_per_second": round(cost.tokens_per_second),
            "smallest_batch_ms": round(cost.floor * 1000, 2),
            "batch_tokens": full,
        }
        log.info("calibrated", extra={"fields": fields})
        if self._pipeline.encoder.device.type == "cpu":
            return DevicePlan(cost, batch_limits)
        launched, _ = self._launch_seconds(full, limits.max_input_tokens)
        return DevicePlan(cost, batch_limits, launched + _SLACK_SECONDS)

    def _time(self, tokens: int, longest: int, pipeline: Pipeline | None = None) -> float:
        """Seconds for a batch of about this many tokens: the better of two runs, after one that does not count."""
        rows = self._example(tokens, longest)

        def once() -> float:
            began = time.perf_counter()
            self._launch(rows, pipeline).wait()
            return time.perf_counter() - began

        once()
        return min(once(), once())

    def _launch_seconds(self, tokens: int, longest: int) -> tuple[float, float]:
        """Seconds until a batch of about this many tokens is launched, and until its vectors are there."""
        rows = self._example(tokens, min(_TIMED_TEXT_TOKENS, longest))
        launched, whole = [], []
        for _ in range(5):
            began = time.perf_counter()
            pending = self._launch(rows)
            launched.append(time.perf_counter() - began)
            pending.wait()
            whole.append(time.perf_counter() - began)
        return statistics.median(launched), statistics.median(whole)

    def _example(self, tokens: int, longest: int) -> list[EmbedRow]:
        """A batch of about `tokens` tokens, whose texts have at most `longest` tokens and are all different."""
        encoder = self._pipeline.encoder
        width, vocabulary = encoder.manifest.width, encoder.model.get_input_embeddings().num_embeddings
        each = min(tokens, longest)
        return [
            EmbedRow(TokenizedText([(31 * number + i) % vocabulary for i in range(each)], 0), width)
            for number in range(tokens // each)
        ]

    def _launch(self, rows: list[EmbedRow], pipeline: Pipeline | None = None) -> Pending:
        try:
            wanted = [Wanted(row.width, row.normalize) for row in rows]
            return (pipeline or self._pipeline).launch([row.text for row in rows], wanted)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                self._check_device()
                raise
        # Not within the handler: inside it, the error's traceback holds the tensors that filled the memory.
        self._metrics.oom.inc()
        if self._pipeline.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory("the device has too little memory for this input")

    def _check_device(self) -> None:
        """After an error, raise DeviceLost if the device does not work any more."""
        try:
            self._pipeline.probe()
        except RuntimeError as error:
            raise DeviceLost(f"the device can't compute any more: {error}") from error

    def _finish(self, rows: list[EmbedRow], pending: Pending, given: float) -> list[Vector | EncodingError]:
        vectors = pending.wait()
        self._measure(rows, given)
        # The sum of a vector is finite only if all its numbers are, so one check for each vector is enough.
        finite: NDArray[np.bool_] = np.isfinite(vectors.sum(axis=1))
        results: list[Vector | EncodingError] = []
        end = 0
        for row in rows:
            start, end = end, end + row.text.vectors
            if not finite[start:end].all():
                self._metrics.nonfinite.inc()
                results.append(NonFiniteEmbedding("the model gave no finite vector for this input"))
            else:
                results.append(vectors[start:end, : row.width] if row.text.spans else vectors[start, : row.width])
        return results

    def _measure(self, rows: list[EmbedRow], given: float) -> None:
        ended = time.perf_counter()
        seconds = ended - max(given, self._last_ended)
        self._last_ended = ended
        tokens = sum(map(len, rows))
        flops = self._shape.linear_flops_per_token * tokens + self._shape.attention_flops(map(len, rows))
        for kind, amount in (("seconds", seconds), ("flops", flops), ("tokens", tokens)):
            self._of_late[kind] = (1 - _NEWEST) * self._of_late[kind] + _NEWEST * amount
        metrics, late = self._metrics, self._of_late
        metrics.device_seconds.labels(self.device).inc(seconds)
        metrics.model_flops.labels(self.device).inc(flops)
        metrics.model_flops_utilization.set(late["flops"] / late["seconds"] / self._flops_per_second)
        metrics.throughput.set(late["tokens"] / late["seconds"])

    def _watch_memory(self) -> None:
        device = self._pipeline.encoder.device
        if device.type != "cuda":
            return
        for kind, read in (
            ("allocated", lambda: torch.cuda.memory_allocated(device)),
            ("reserved", lambda: torch.cuda.memory_reserved(device)),
            ("total", lambda: torch.cuda.get_device_properties(device).total_memory),
        ):
            self._metrics.gpu_memory_bytes.labels(kind, self.device).set_function(read)

    @property
    def device(self) -> str:
        """The device in use, such as cuda:0."""
        return str(self._pipeline.encoder.device)

    @property
    def dtype(self) -> str:
        """The arithmetic in use, such as bfloat16."""
        return str(self._pipeline.encoder.dtype).removeprefix("torch.")

    @property
    def kernel(self) -> str:
        """The attention kernel in use, such as torch-flash, or torch-flash with FA3 in its place."""
        kernel = self._pipeline.encoder.kernel
        return f"{kernel} ({self._newer_flash})" if self._newer_flash else kernel


def _lacks_compiler() -> str:
    found = any(map(shutil.which, ("g++", "clang++", "c++"))) and any(map(shutil.which, ("gcc", "clang", "cc")))
    return "" if found else "a C and C++ compiler (g++)"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory ran out. Only torch's CUDA allocator has a class for it; others have words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
