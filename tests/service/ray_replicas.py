"""The server on Ray Serve with two replicas: what happens when one is killed, and when there are more or fewer.

    python -m tests.service.ray_replicas [--model DIR|RECIPE] [--requests 400] [--only killed|scaled] --out FILE

killed  Clients in closed loop ask two replicas. When a third of the answers are there, one replica is killed (SIGKILL).
        What each attempt came to is counted: an answer, an error after which a client may come again (429 or 5xx), or a
        connection that broke; a request is lost if it got none of these. OpenAI's own client, which comes again by
        itself, then asks the same while the other replica is killed: there every request must get its vectors. Each
        vector is held to those of before. Healed means that two replicas are running again.
scaled  Many clients ask one replica until there are two, by the tokens that wait, and then nobody asks until there is
        one again.

Ray starts on this machine, with as much of it as it finds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pybase64
import ray
from numpy.typing import NDArray
from openai import OpenAI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from service.ray.ray_serve import deployment
from service.server.startup import prepare_store
from service.settings import Settings

_CLIENTS = 8
_WORDS = (
    "the river ran past a mill and ground corn of every valley for people in town who ate bread at night while "
    "engineers built bridges between distant cities under heavy rain that kept children awake until early morning"
)
_HEAL_SECONDS = 240.0

# Of the part that scales.
_MANY_CLIENTS = 32
_TARGET_TOKENS = 500

_MOST_ATTEMPTS = 100

# bfloat16 in other batches; 0.9998 was the lowest seen (docs/fidelity.md).
_LEAST_COSINE = 0.999


def main() -> None:
    """Try, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=400, help="of each part, 4 texts each (default %(default)s)")
    parser.add_argument("--only", choices=("killed", "scaled"))
    parser.add_argument("--out", type=Path, required=True, help="a file for the figures, as JSON")
    options = parser.parse_args()
    folder, manifest = prepare_store(Settings(model=options.model), lambda done, total: None)
    chance = random.Random(0)
    texts = [f"{number}: {' '.join(chance.choices(_WORDS.split(), k=20))}" for number in range(4 * options.requests)]
    requests = [texts[start : start + 4] for start in range(0, len(texts), 4)]
    result: dict[str, Any] = {"model": manifest.name, "requests": len(requests), "clients": _CLIENTS}
    with ray_cluster() as port:
        for name, part in (("killed", killed), ("scaled", scaled)):
            if options.only in (None, name):
                result[name] = part(folder, manifest.name, port, requests)
                print(name, result[name], flush=True)
    options.out.write_text(json.dumps(result))


@contextmanager
def ray_cluster() -> Iterator[int]:
    """Ray and its proxy on this machine; the proxy's port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    ray.init(include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, num_cpus=8)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(folder: Path, replicas: int, **further: Any) -> None:
    """So many replicas of the encoder, which share the cores, once they are ready."""
    threads = max(len(os.sched_getaffinity(0)) // replicas, 1)
    settings = {"model": str(folder), "device": "cpu", "log_level": "warning"}
    options: dict[str, Any] = {
        **({} if further else {"num_replicas": replicas}),
        **further,
        "health_check_period_s": 1,
        "ray_actor_options": {"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}},
    }
    serve.run(deployment(settings).options(**options).bind(), name="llm2vec", route_prefix="/")


# What happens when a replica is killed.


@dataclass
class Attempts:
    """What each request and each attempt came to; `lost` ones got no answer after many."""

    outcomes: Counter[str] = field(default_factory=Counter)
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    lost: int = 0
    seconds: float = 0.0


def killed(folder: Path, model: str, port: int, requests: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Load with a replica killed in the midst of it, twice: by clients that count, and by OpenAI's."""
    deploy(folder, 2)
    before = load(requests, counting_client(port, model))
    assert before.outcomes == {"200": len(requests)}, before.outcomes
    counted, healed_counted = load_and_kill(requests, counting_client(port, model))
    by_openai, healed_openai = load_and_kill(requests, openai_client(port, model))
    return {
        "undisturbed": {"answers": dict(before.outcomes), "seconds": round(before.seconds, 1)},
        "counted": {
            "attempts": dict(counted.outcomes),
            "lost": counted.lost,
            "wrong": wrong(counted, before),
            "healed_after_seconds": healed_counted,
        },
        "openai": {
            "answered": by_openai.outcomes["200"],
            "failed": by_openai.outcomes.total() - by_openai.outcomes["200"],
            "wrong": wrong(by_openai, before),
            "healed_after_seconds": healed_openai,
        },
    }


def wrong(found: Attempts, before: Attempts) -> int:
    """Requests whose vectors are not those of before."""
    pairs = [(vectors, before.vectors[place]) for place, vectors in found.vectors.items()]
    return sum(float((left * right).sum(1).min()) < _LEAST_COSINE for left, right in pairs)


def load_and_kill(
    requests: Sequence[Sequence[str]], client: Callable[[], Callable[[Sequence[str], Attempts], Any]]
) -> tuple[Attempts, float]:
    """What the load came to, and seconds from the kill to two replicas that run."""
    victims = replica_processes()
    assert len(victims) == 2, victims
    killed_at = []

    def kill() -> None:
        os.kill(victims[0], signal.SIGKILL)
        killed_at.append(time.perf_counter())

    found = load(requests, client, after=len(requests) // 3, then=kill)
    # Ray says for a moment that both run, before it knows that one is gone.
    seconds_until(lambda: running_replicas() == len(set(replica_processes()) - {victims[0]}) == 2)
    return found, round(time.perf_counter() - killed_at[0], 1)


def replica_processes() -> list[int]:
    """Process ids of the replicas that this process's own Ray has started (Linux)."""
    node: Any = ray._private.worker._global_node
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, title = (folder / "status").read_text(), (folder / "cmdline").read_text()
        except OSError:
            continue
        if f"PPid:\t{raylet}\n" in status and title.startswith("ray::ServeReplica"):
            found.append(int(folder.name))
    return sorted(found)


def load(
    requests: Sequence[Sequence[str]],
    client: Callable[[], Callable[[Sequence[str], Attempts], Any]],
    after: int = 0,
    then: Callable[[], None] = lambda: None,
) -> Attempts:
    """All requests, by clients in closed loop; `then` is called when so many are answered."""
    found = Attempts()
    places = iter(range(len(requests)))
    turn = threading.Lock()

    def work(_: int) -> None:
        embed = client()
        while True:
            with turn:
                place = next(places, None)
            if place is None:
                return
            vectors = embed(requests[place], found)
            with turn:
                if vectors is None:
                    found.lost += 1
                else:
                    found.vectors[place] = vectors
                if len(found.vectors) == after:
                    then()

    began = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(work, range(_CLIENTS)))
    found.seconds = time.perf_counter() - began
    return found


def counting_client(port: int, model: str) -> Callable[[], Callable[[Sequence[str], Attempts], Any]]:
    """Clients that count what each attempt came to, and come again after what a client may."""

    def make() -> Callable[[Sequence[str], Attempts], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

        def embed(texts: Sequence[str], found: Attempts) -> NDArray[np.float32] | None:
            body = orjson.dumps({"model": model, "input": list(texts), "encoding_format": "base64"})
            for _ in range(_MOST_ATTEMPTS):
                try:
                    connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    found.outcomes[type(error).__name__] += 1
                    connection.close()
                else:
                    found.outcomes[str(answer.status)] += 1
                    if answer.status == 200:
                        items = orjson.loads(content)["data"]
                        return np.stack([np.frombuffer(pybase64.b64decode(one["embedding"]), "<f4") for one in items])
                    if answer.status != 429 and answer.status < 500:
                        return None
                time.sleep(0.1)
            return None

        return embed

    return make


def openai_client(port: int, model: str) -> Callable[[], Callable[[Sequence[str], Attempts], Any]]:
    """OpenAI's client as it comes, but for the number of attempts, which is 2 more by default."""

    def make() -> Callable[[Sequence[str], Attempts], Any]:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)

        def embed(texts: Sequence[str], found: Attempts) -> NDArray[np.float32] | None:
            try:
                answer = client.embeddings.create(model=model, input=list(texts))
            except Exception as error:
                found.outcomes[type(error).__name__] += 1
                return None
            found.outcomes["200"] += 1
            return np.array([item.embedding for item in answer.data], np.float32)

        return embed

    return make


# How many replicas there are.


def scaled(folder: Path, model: str, port: int, requests: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Seconds of load until there were two replicas, and seconds without until there was one."""
    path = "service.ray.scaling:QueuedTokens"
    policy = AutoscalingPolicy(policy_function=path, policy_kwargs={"target": _TARGET_TOKENS})
    scaling = AutoscalingConfig(
        min_replicas=1, max_replicas=2, upscale_delay_s=2, downscale_delay_s=5, look_back_period_s=15, policy=policy
    )
    deploy(folder, 1, autoscaling_config=scaling)
    assert running_replicas() == 1
    asking = threading.Event()
    asking.set()
    answered: Counter[str] = Counter()

    def work(number: int) -> None:
        found = Attempts()
        embed = counting_client(port, model)()
        while asking.is_set():
            embed([f"{number} {text}" for text in requests[found.outcomes.total() % len(requests)]], found)
        answered.update(found.outcomes)

    with ThreadPoolExecutor(_MANY_CLIENTS) as pool:
        work_done = [pool.submit(work, number) for number in range(_MANY_CLIENTS)]
        try:
            up = seconds_until(lambda: running_replicas() == 2)
        finally:
            asking.clear()
        for one in work_done:
            one.result()
    return {
        "up_after_seconds": up,
        "answers": dict(answered),
        "down_after_seconds": seconds_until(lambda: running_replicas() == 1),
    }


def running_replicas() -> int:
    """Those that take requests."""
    (found,) = serve.status().applications["llm2vec"].deployments.values()
    return {str(state): count for state, count in found.replica_states.items()}.get("RUNNING", 0)


def seconds_until(holds: Callable[[], bool]) -> float:
    """How long it took."""
    began = time.perf_counter()
    while not holds():
        assert time.perf_counter() < began + _HEAL_SECONDS, "it did not happen"
        time.sleep(0.2)
    return round(time.perf_counter() - began, 1)


if __name__ == "__main__":
    main()
