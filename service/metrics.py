"""Every Prometheus series of the server, in one place. No label ever carries text, a user or a key.

In a server of several processes each process has all series, but moves only its own. A page shows them merged. Most are
summed over the processes, so counters, queues and their limit, `throughput_tokens_per_second` and
`gemm_flops_per_second` count all devices together. The exceptions:
- the largest `batch_tokens_full`, time at the start, and wait of the oldest input;
- the smallest `token_budget` of an engine;
- `ready` is 1 only if every front end is ready;
- the mean of `model_flops_utilization` over engines;
- `build_info` appears once for each kind of device.

Series with the label `device` are of one device each, such as cuda:1; engines on one CPU are one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from statistics import mean

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric

disable_created_metrics()  # type: ignore[no-untyped-call]

# Half a millisecond (a small model on a GPU) to two minutes (a large request on a CPU).
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_TOKENS = (*_COUNTS, 4096, 8192, 16384, 32768, 65536)
_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Series of these labels are there from the start, as 0.
_REJECTION_REASONS = (
    *("overloaded", "loading", "draining", "failed", "context_length_exceeded", "request_too_large"),
    *("request_timeout", "invalid_api_key", "invalid", "timeout"),
)
_DROP_REASONS = ("slow_request", "slow_reader", "too_many", "bad_request")
_INSTRUCTION_SOURCES = ("item", "text", "request", "input_type", "alias", "header", "default", "none")


# The names of text-embeddings-inference for these series: each with its kind, and the name of this server's series.
# Here queue times are for each input, and inference times for each batch.
_TEI_NAMES = {
    "te_request_count": ("counter", "llm2vec_requests_total"),
    "te_request_success": ("counter", 'llm2vec_requests_total{code="",'),
    "te_embed_count": ("counter", "llm2vec_inputs_total"),
    "te_queue_size": ("gauge", "llm2vec_queue_inputs"),
    "te_request_duration": ("histogram", "llm2vec_request_duration_seconds"),
    "te_request_tokenization_duration": ("histogram", "llm2vec_tokenize_seconds"),
    "te_request_queue_duration": ("histogram", "llm2vec_queue_wait_seconds"),
    "te_request_inference_duration": ("histogram", "llm2vec_inference_seconds"),
    "te_request_input_length": ("histogram", "llm2vec_input_tokens"),
    "te_batch_next_size": ("histogram", "llm2vec_batch_inputs"),
    "te_batch_next_tokens": ("histogram", "llm2vec_batch_tokens"),
}

# One process's series: the metric's name, the series' own name (with _count and so on), its labels and its value.
Samples = list[tuple[str, str, dict[str, str], float]]

# Metrics whose values are not added up.
_LARGEST = frozenset(
    f"llm2vec_{name}"
    for name in ("queue_oldest_seconds", "batch_tokens_full", "model_load_seconds", "warmup_seconds", "build_info")
)
_ALL_FRONT_ENDS = "llm2vec_ready"
_MEAN_OF_ENGINES = "llm2vec_model_flops_utilization"
_LEAST_OF_ENGINES = "llm2vec_token_budget"
_OF_ENGINES_ALONE = (_MEAN_OF_ENGINES, _LEAST_OF_ENGINES)


class Metrics:
    """The series of one server, in a registry of its own so that several servers fit in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="llm2vec", registry=self.registry)
        gauge = partial(Gauge, namespace="llm2vec", registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, about, labels, "llm2vec", buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests answered", ("route", "status", "code"))
        self.request_seconds = histogram(
            "request_duration_seconds",
            "From the first byte of a request to the last byte of its answer; class is empty if nothing was queued",
            _SECONDS,
            ("route", "class"),
        )
        self.inflight = gauge("inflight_requests", "Requests being worked on")
        self.bytes_in_flight = gauge("bytes_in_flight", "Bytes that requests and their answers hold in memory")
        self.inputs = counter("inputs", "Inputs embedded")
        self.tokens = counter("tokens", "Tokens computed; kind text counts the pooled ones", ("kind",))
        self.request_inputs = histogram("request_inputs", "Inputs in a request", _COUNTS)
        self.input_tokens = histogram("input_tokens", "Tokens of an input", _TOKENS)
        self.tokenize_seconds = histogram("tokenize_seconds", "Seconds to tokenize a request", _SECONDS)
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "Seconds an input waited for its batch", _SECONDS, ("class",)
        )
        self.inference_seconds = histogram("inference_seconds", "Seconds of a batch on the device", _SECONDS)
        self.serialize_seconds = histogram("serialize_seconds", "Seconds to write an answer's vectors", _SECONDS)
        self.batch_inputs = histogram("batch_inputs", "Inputs in a batch", _COUNTS)
        self.batch_tokens = histogram("batch_tokens", "Tokens in a batch", _TOKENS)
        self.batch_fill_ratio = histogram("batch_fill_ratio", "A batch's tokens divided by batch_tokens_full", _RATIOS)
        self.queue_inputs = gauge("queue_inputs", "Inputs waiting for a batch", ("class",))
        self.queue_tokens = gauge("queue_tokens", "Tokens waiting for a batch", ("class",))
        self.max_queued_tokens = gauge("max_queued_tokens", "Tokens that may wait for a batch, in each class")
        self.queue_oldest_seconds = gauge("queue_oldest_seconds", "How long the oldest input has waited", ("class",))
        self.dedup_hits = counter("dedup_hits", "Inputs that shared the computation of an equal waiting input")
        self.cache_hits = counter("cache_hits", "Inputs whose vector came from the cache")
        self.rejected = counter("rejected", "Requests turned away", ("reason",))
        self.dropped_connections = counter(
            "dropped_connections", "Connections that the server closed because of their clients", ("reason",)
        )
        self.cancelled = counter("cancelled", "Work dropped because its client hung up", ("stage",))
        self.instruction_inputs = counter(
            "instruction_inputs", "Inputs by where their instruction came from", ("source",)
        )
        self.truncated_inputs = counter("truncated_inputs", "Inputs that lost tokens to a length limit")
        self.token_id_inputs = counter("token_id_inputs", "Inputs of token ids by their vocabulary", ("decoder",))
        self.ignored_fields = counter("ignored_fields", "Unknown request fields")
        self.batch_failures = counter("batch_failures", "Batches that failed on the device, halves included")
        self.nonfinite = counter(
            "nonfinite", "Vectors that held NaN or infinity; each is withheld and computed once more, alone"
        )
        self.oom = counter("oom", "Batches that ran out of device memory, parts of split ones included")
        self.oom_splits = counter("oom_splits", "Batches split because they ran out of device memory")
        self.token_budget = gauge(
            "token_budget", "Most tokens in one batch; lower for a while after a batch ran out of memory"
        )
        self.batch_tokens_full = gauge("batch_tokens_full", "Tokens at which a batch is full")
        self.device_seconds = counter("device_seconds", "Seconds the device worked on batches", ("device",))
        self.model_flops = counter(
            "model_flops", "Floating-point operations of the tokens computed, without padding", ("device",)
        )
        self.gemm_flops_per_second = gauge(
            "gemm_flops_per_second", "Rate of this device in large matrix products, measured at the start"
        )
        self.model_flops_utilization = gauge(
            "model_flops_utilization",
            "model_flops divided by device_seconds and gemm_flops_per_second, over recent batches",
        )
        self.throughput = gauge("throughput_tokens_per_second", "Tokens divided by device_seconds, over recent batches")
        self.gpu_memory_bytes = gauge("gpu_memory_bytes", "Device memory as torch sees it", ("kind", "device"))
        self.ready = gauge("ready", "1 when the server answers, 0 while it loads or drains")
        self.model_load_seconds = gauge("model_load_seconds", "Seconds to load the weights")
        self.warmup_seconds = gauge("warmup_seconds", "Seconds of warm-up before the server was ready")
        self.build_info = gauge("build_info", "Constant 1", ("version", "model", "device", "dtype", "pooling"))

        self.requests.labels("/v1/embeddings", "200", "")
        self.text_tokens, self.instruction_tokens = map(self.tokens.labels, ("text", "instruction"))
        for metric, values in (
            (self.rejected, _REJECTION_REASONS),
            (self.dropped_connections, _DROP_REASONS),
            (self.cancelled, ("queued", "request")),
            (self.instruction_inputs, _INSTRUCTION_SOURCES),
            (self.token_id_inputs, ("model", "cl100k_base", "o200k_base")),
            (self.queue_wait_seconds, ("interactive", "bulk")),
        ):
            for value in values:
                metric.labels(value)

    def read_queue(
        self, lane: str, inputs: Callable[[], float], tokens: Callable[[], float], oldest: Callable[[], float]
    ) -> None:
        """Read a lane's gauges from these functions whenever the page is asked for."""
        self.queue_inputs.labels(lane).set_function(inputs)
        self.queue_tokens.labels(lane).set_function(tokens)
        self.queue_oldest_seconds.labels(lane).set_function(oldest)

    @lru_cache(maxsize=1024)  # noqa: B019  one server, one object
    def of_request(self, route: str, status: str, code: str, lane: str) -> tuple[Counter, Histogram]:
        """The counter and the duration histogram of requests with these labels."""
        return self.requests.labels(route, status, code), self.request_seconds.labels(route, lane)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def samples(self) -> Samples:
        return [
            (metric.name, sample.name, dict(sample.labels), float(sample.value))
            for metric in self.registry.collect()
            for sample in metric.samples
        ]


def with_tei_names(page: bytes) -> bytes:
    """The page, with the metrics that text-embeddings-inference also has repeated under its names."""
    lines = page.decode().splitlines()
    more = []
    for name, (kind, own) in _TEI_NAMES.items():
        base = own.partition("{")[0]
        ends = ("_bucket{", "_count", "_sum") if kind == "histogram" else ("{", " ")
        more.append(f"# TYPE {name} {kind}")
        more += [
            name + line.removeprefix(base)
            for line in lines
            if line.startswith(own) and line.removeprefix(base).startswith(ends)
        ]
    return "\n".join([*lines, *more, ""]).encode()


def merged_page(front_ends: Sequence[Samples], engines: Sequence[Samples]) -> bytes:
    """The metrics of a server of several processes in Prometheus' text format."""
    return generate_latest(_Merged(merge(front_ends, engines)))


def merge(front_ends: Sequence[Samples], engines: Sequence[Samples]) -> Samples:
    """Merge the processes' series. Metrics keep the order of their first appearance, with all their series together."""
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]] = {}
    for samples, is_engine in [(given, False) for given in front_ends] + [(given, True) for given in engines]:
        for metric, name, labels, value in samples:
            series = values.setdefault(metric, {}).setdefault((name, tuple(labels.items())), [])
            if metric != _ALL_FRONT_ENDS if is_engine else metric not in _OF_ENGINES_ALONE:
                series.append(value)
    return [
        (metric, name, dict(labels), _together(metric, given))
        for metric, series in values.items()
        for (name, labels), given in series.items()
    ]


def _together(metric: str, values: Iterable[float]) -> float:
    if metric in _LARGEST:
        return max(values)
    if metric in (_ALL_FRONT_ENDS, _LEAST_OF_ENGINES):
        return min(values)
    return mean(values) if metric == _MEAN_OF_ENGINES else sum(values)


class _Merged:
    """Merged samples under the names and explanations of every process's metrics."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        metrics = {metric.name: metric for metric in Metrics().registry.collect()}
        for metric in metrics.values():
            metric.samples = []
        for family, name, labels, value in self._samples:
            metrics[family].add_sample(name, labels, value)
        yield from metrics.values()
