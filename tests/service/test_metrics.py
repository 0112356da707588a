"""A page of several processes' metrics."""

from __future__ import annotations

from service.metrics import Metrics, merge, merged_page


def value(page: bytes, series: str) -> float:
    return float(next(line for line in page.decode().splitlines() if line.startswith(f"{series} ")).split()[-1])


def test_one_process_merged_is_its_own_page() -> None:
    metrics = Metrics()
    metrics.of_request("/v1/embeddings", "200", "", "bulk")[1].observe(0.02)
    metrics.build_info.labels("1", "m", "cpu", "float32", "mean").set(1)
    metrics.read_queue("bulk", lambda: 3, lambda: 30, lambda: 0.25)
    # What an engine alone has is absent here, so it is shown without a value on neither page.
    alone = [line for line in metrics.page().decode().splitlines() if "model_flops_utilization 0.0" not in line]
    merged = merged_page([metrics.samples()], [Metrics().samples()]).decode().splitlines()
    assert [line for line in merged if "model_flops_utilization 0.0" not in line] == alone


def test_processes_are_added_up() -> None:
    fronts, engines = [Metrics(), Metrics()], [Metrics(), Metrics()]
    for number, front in enumerate(fronts, 1):
        front.ready.set(1)
        front.inputs.inc(10 * number)
        front.of_request("/v1/embeddings", "200", "", "bulk")[1].observe(0.02)
    fronts[1].of_request("/only/here", "404", "not_found", "")[0].inc()
    for number, engine in enumerate(engines, 1):
        engine.read_queue("bulk", lambda n=number: n, lambda n=number: 100 * n, lambda n=number: n / 10)  # type: ignore[misc]
        engine.model_flops_utilization.set(0.2 * number)
        engine.throughput.set(1000 * number)
        engine.warmup_seconds.set(number)
        engine.max_queued_tokens.set(500)
        engine.device_seconds.labels(f"cuda:{number}").inc(number)
        engine.token_budget.set(8192 // number)
        engine.build_info.labels("1", "m", "cpu", "float32", "mean").set(1)
    page = merged_page([one.samples() for one in fronts], [one.samples() for one in engines])
    for series, expected in {
        "llm2vec_inputs_total": 30,
        "llm2vec_ready": 1,
        "llm2vec_token_budget": 4096,
        'llm2vec_request_duration_seconds_bucket{class="bulk",le="0.025",route="/v1/embeddings"}': 2,
        'llm2vec_request_duration_seconds_count{class="bulk",route="/v1/embeddings"}': 2,
        'llm2vec_requests_total{code="not_found",route="/only/here",status="404"}': 1,
        'llm2vec_queue_tokens{class="bulk"}': 300,
        'llm2vec_queue_oldest_seconds{class="bulk"}': 0.2,
        "llm2vec_throughput_tokens_per_second": 3000,
        "llm2vec_warmup_seconds": 2,
        "llm2vec_max_queued_tokens": 1000,
        'llm2vec_device_seconds_total{device="cuda:2"}': 2,
        'llm2vec_build_info{device="cpu",dtype="float32",model="m",pooling="mean",version="1"}': 1,
    }.items():
        assert value(page, series) == expected, series
    assert abs(value(page, "llm2vec_model_flops_utilization") - 0.3) < 1e-9


def test_ready_only_if_every_front_end_is() -> None:
    ready, loading, engine = Metrics(), Metrics(), Metrics()
    ready.ready.set(1)
    together = merge([ready.samples(), loading.samples()], [engine.samples()])
    assert [given for _, name, _, given in together if name == "llm2vec_ready"] == [0]
