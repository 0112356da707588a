"""One replica on Ray Serve beside `llm2vec-service serve`: the same requests by turns; whoever is not asked is idle.

    python -m bench.ray_serve [--model DIR|RECIPE] [--requests 400] [--save]

A request has four texts. Ray starts on this machine, with as much of it as it finds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import ray
from ray import serve

from bench.client import ask, percentiles, requests_of
from bench.report import by_turns, finish, medians, options_of, ratio
from bench.server import free_port, serving, stored
from bench.texts import sentences
from service.ray.ray_serve import deployment

_CLIENTS = 8
_ROUNDS = 3
_INPUTS = 4


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", requests=400)
    folder, manifest = stored(options.model)
    pool = cycle(text for text in sentences() if len(text) < 200)
    texts = [f"{number}: {text}" for number, text in enumerate(islice(pool, options.requests * _INPUTS))]

    def again(mark: str, most: int | None = None, inputs: int = _INPUTS) -> list[bytes]:
        """The same, but no text that was asked before."""
        return requests_of([f"{mark}: {text}" for text in texts[:most]], inputs, manifest.name)

    number = count()

    def rate(url: str) -> float:
        return ask(url, again(f"round {next(number)}"), _CLIENTS).per_second

    latencies: dict[str, dict[str, float]] = {}
    with replica(folder) as ray_url, serving(folder, {"LLM2VEC_DEVICE": "cpu"}) as plain:
        urls = {"ray_serve": ray_url, "plain": plain.url}
        for url in urls.values():
            ask(url, again("warm-up", _CLIENTS * _INPUTS), _CLIENTS)  # the first batches are not typical
        rates = by_turns(_ROUNDS, {name: partial(rate, url) for name, url in urls.items()})
        for name, url in urls.items():
            latencies[name] = percentiles(ask(url, again(f"{name} alone", 50, 1), 1).latencies, (50, 95, 99))
    speed = {
        "requests_per_second": medians(rates, 2),
        "ratio": ratio(rates["ray_serve"], rates["plain"]),
        "ratios": [ratio([left], [right]) for left, right in zip(rates["ray_serve"], rates["plain"], strict=True)],
        "single_text_one_client": latencies,
    }
    about = {"model": manifest.name, "requests": options.requests, "clients": _CLIENTS}
    finish("ray_serve", {**about, "speed": speed}, options.save)


@contextmanager
def replica(folder: Path) -> Iterator[str]:
    """The address of Ray's proxy before one replica with all cores, once it is ready."""
    port, threads = free_port(), str(len(os.sched_getaffinity(0)))
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    ray.init(include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, num_cpus=8)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        one = deployment({"model": str(folder), "device": "cpu", "log_level": "warning"}).options(
            ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}}}
        )
        serve.run(one.bind(), name="llm2vec", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
