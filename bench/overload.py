"""What a server does with more than it can: goodput, refusals and waits from half of its capacity to twenty times.

    python -m bench.overload [--model DIR|RECIPE] [--seconds 8] [--save]

The server is `bench.stand_in` before a device of fixed speed, so that what refusing costs the HTTP side is seen and not
how a CPU is shared. It has one core, the clients the other. Requests arrive at random, whatever was answered; a client
of so many connections sends them, and counts what finds none of them free as unsent. Capacity is what that device could
do, were all else free.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench.client import LOST, UNSENT, Answer, open_loop, percentiles, requests_of
from bench.report import finish, options_of, tell
from bench.server import serving, stored
from bench.texts import distinct_texts, tokenized

_FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 5.0, 10.0, 20.0)
_INPUTS = 16

# So many that none waits twice at once, which would be computed once.
_TEXTS = 65536
_TOKENS_PER_SECOND = 10_000.0
_CONNECTIONS = 400
_WARM_UP_SECONDS = 4.0
_PICTURE = Path(__file__).parents[1] / "docs" / "overload.svg"
_LATENCIES = {"p50_ms": "answered, p50", "p99_ms": "answered, p99", "refused_p50_ms": "refused, p50"}

_SETTINGS = {
    "BENCH_TOKENS_PER_SECOND": _TOKENS_PER_SECOND,
    "LLM2VEC_BATCH_TOKENS": 1024,
    "LLM2VEC_DEVICE": "cpu",
    "LLM2VEC_LOG_LEVEL": "warning",
    "LLM2VEC_MAX_QUEUED_TOKENS": 20_000,  # two seconds' work: what is admitted is answered in about that time
}


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", seconds=8.0)
    folder, manifest = stored(options.model)
    texts = distinct_texts(_TEXTS)
    requests = itertools.cycle(requests_of(texts, _INPUTS, manifest.name))
    tokens = sum(map(len, tokenized(texts, folder)))
    capacity = _TOKENS_PER_SECOND / (tokens / _TEXTS * _INPUTS)
    print(f"capacity: {capacity:.1f} requests of {_INPUTS} texts a second", flush=True)
    rows: list[dict[str, Any]] = []
    settings = {**_SETTINGS, "BENCH_WIDTH": manifest.width}
    cores = sorted(os.sched_getaffinity(0))
    with serving(folder, settings, "bench.stand_in", (cores[:1], cores[1:2])) as server:
        for factor in _FACTORS:
            began, whole = time.perf_counter(), _WARM_UP_SECONDS + options.seconds
            found = uvloop.run(open_loop(server.url, requests, factor * capacity, whole, _CONNECTIONS))
            rows.append({"factor": factor, **figures(found, began + _WARM_UP_SECONDS, began + whole)})
            tell(f"{factor:g}x", rows[-1])
            time.sleep(1)
    best = max(row["goodput"] for row in rows)
    result = {
        "capacity": round(capacity, 1),
        "inputs": _INPUTS,
        "loads": rows,
        "goodput at the highest load / best": round(rows[-1]["goodput"] / best, 3),
    }
    finish("overload", result, options.save)
    if options.save:
        draw(rows, result["capacity"])


def figures(found: Sequence[Answer], since: float, until: float) -> dict[str, Any]:
    """What was offered, and what was answered, from a time to another."""
    seconds = until - since
    offered = [answer for answer in found if since <= answer.asked < until]
    answered = [one for one in found if one.status > 0 and since <= one.asked + one.seconds < until]
    good, refused = ([one.seconds for one in answered if one.status == status] for status in (200, 429))
    lost = sum(answer.status == LOST for answer in found)
    return {
        "offered": round(len(offered) / seconds, 1),
        "goodput": round(len(good) / seconds, 1),
        "refused": round(len(refused) / seconds, 1),
        "unsent": round(sum(answer.status == UNSENT for answer in offered) / seconds, 1),
        "others": len(answered) - len(good) - len(refused) + lost,
        **percentiles(good),
        "refused_p50_ms": percentiles(refused)["p50_ms"],
    }


def draw(rows: Sequence[dict[str, Any]], capacity: float) -> None:
    """docs/overload.svg: of the same figures the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    factors = [row["factor"] for row in rows]
    with pyplot.rc_context({"svg.hashsalt": "overload", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
        left.plot(factors, [row["goodput"] / capacity for row in rows], "o-", label="answered")
        left.plot(factors, [min(factor, 1.0) for factor in factors], ":", color="grey", label="ideal")
        left.set(ylabel="goodput / capacity", ylim=(0, 1.2))
        for name, label in _LATENCIES.items():
            found = [(row["factor"], row[name]) for row in rows if row[name]]
            right.plot(*zip(*found, strict=True), "x-" if "refused" in label else "o-", label=label)
        right.set(yscale="log", ylabel="ms from sending to answer")
        right.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        for axes in (left, right):
            axes.set(xscale="log", xlabel="offered load / capacity")
            axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
        figure.tight_layout()
        figure.savefig(_PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
