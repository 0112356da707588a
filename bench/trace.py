"""A picture of what the server's threads do for a moment, as a bulk request comes among single queries.

    python -m bench.trace [--model DIR|RECIPE] [--milliseconds 1000] [--out build/trace.png] [--notes FILE] [--save]

A few clients send one query after another, and after some seconds a bulk request comes too. `bench.traced_server` notes
when each of its threads is busy. The notes of the time in the picture stay beside it
as JSON; --notes draws such a file again, and starts no server.
"""

from __future__ import annotations

import asyncio
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from bench.client import Answers, closed_loop, connect, exchange, percentiles, requests_of
from bench.report import finish, options_of
from bench.server import serving, stored
from bench.texts import distinct_texts, mixed_texts
from model_store.evaluation.report import check_picture

_CLIENTS = 4
_BULK_INPUTS = 1024
_WARM_UP_SECONDS = 3.0
_BEFORE_BULK = 0.2  # of the picture

# By the names of threads, without their numbers.
_COLOURS = {"device": "#3465a4", "event loop": "#cc6600", "results": "#75507b", "tokenizer": "#4e9a06"}
_HEIGHT = 0.7  # of a row, which are 1 apart


def main() -> None:
    """Trace and draw, or only draw."""
    options = options_of(__doc__, model="demo", milliseconds=1000.0, out=Path("build/trace.png"), notes="")
    check_picture(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(Path(options.notes).read_text()) if options.notes else trace(options)
    notes = found.pop("notes")
    rows = {name: [note for note in notes if note[0] == name] for name in sorted({note[0] for note in notes})}
    found["rows"] = {name: figures(own, found["seconds"]) for name, own in rows.items()}
    draw(options.out, found, rows)
    finish("trace", found, options.save)


def trace(options: Namespace) -> dict[str, Any]:
    """The load, and the notes of the time that is drawn; times count from its beginning, in seconds."""
    folder, manifest = stored(options.model)
    file, seconds = options.out.with_suffix(".json").absolute(), options.milliseconds / 1000
    with serving(folder, {"BENCH_TRACE": file}, "bench.traced_server") as server:
        bulk_at, answers = uvloop.run(traffic(server.url, manifest.name, seconds))
    began = bulk_at - _BEFORE_BULK * seconds
    latencies = [one.seconds for one in answers.answers if began <= one.asked < began + seconds]
    found = {
        "model": manifest.name,
        "seconds": seconds,
        "clients": _CLIENTS,
        "queries": len(latencies),
        **percentiles(latencies, [50]),
        "bulk_inputs": _BULK_INPUTS,
        "bulk_at": round(bulk_at - began, 3),
        "notes": list(within(json.loads(file.read_text()), began, began + seconds)),
    }
    file.write_text(json.dumps(found))
    return found


async def traffic(url: str, model: str, seconds: float) -> tuple[float, Answers]:
    """When the bulk request was sent, and the answers to the queries before and after it."""
    (bulk,) = requests_of(mixed_texts(_BULK_INPUTS), _BULK_INPUTS, model)
    queries = requests_of(distinct_texts(8192), 1, model)
    asked = asyncio.create_task(closed_loop(url, queries, _CLIENTS, _WARM_UP_SECONDS + seconds))
    connection = await connect(url)
    await asyncio.sleep(_WARM_UP_SECONDS)
    bulk_at, under_way = time.perf_counter(), asyncio.create_task(exchange(connection, bulk))
    answers = await asked
    under_way.cancel()
    connection[1].close()
    return bulk_at, answers


def within(notes: Sequence[Any], began: float, ended: float) -> Iterator[tuple[str, float, float, float, int]]:
    """The notes of a time, counted from its beginning, without the parts that lie outside it."""
    for row, start, end, cpu, tokens in notes:
        part = min(end, ended) - max(start, began)
        if part > 0:
            yield row, max(start, began) - began, min(end, ended) - began, cpu * part / (end - start), tokens


def figures(own: Sequence[Any], seconds: float) -> dict[str, float]:
    """A row's share of the time, the share in which its thread had a core, and its longest piece of work."""
    lengths = [end - start for _, start, end, _, _ in own]
    on_a_core = sum(note[3] for note in own)
    shares = {"busy": round(sum(lengths) / seconds, 3), "on_a_core": round(on_a_core / seconds, 3)}
    return {**shares, "pieces": len(own), "longest_ms": round(1000 * max(lengths), 2)}


def draw(path: Path, found: dict[str, Any], rows: dict[str, list[Any]]) -> None:
    """Draw a row for each thread, with its figures beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.3 + 0.8 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for place, (name, own) in enumerate(rows.items()):
        of = found["rows"][name]
        shares = f"{100 * of['busy']:.0f} % busy, {100 * of['on_a_core']:.0f} % on a core"
        labels.append(f"{name}\n{shares}\nlongest {of['longest_ms']:.3g} ms")
        began, ended, cpu, tokens = np.array([note[1:] for note in own]).T
        left, width, bottom = 1000 * began, 1000 * (ended - began), place + _HEIGHT / 2
        look = {
            "align": "edge",
            "color": _COLOURS[name.split("_")[0]],
            "edgecolor": "white",
            "linewidth": 0.8 * (tokens > 0),
        }
        axes.bar(left, -_HEIGHT, width, bottom, alpha=0.35, **look)
        axes.bar(left, -_HEIGHT * np.minimum(cpu / (ended - began), 1.0), width, bottom, **look)
        for number in np.flatnonzero((tokens > 0) & (width > 20 * found["seconds"])):  # 2 % of the picture: it fits
            middle = left[number] + width[number] / 2
            axes.text(middle, place - 0.53 * _HEIGHT, f"{tokens[number]:.0f}", fontsize=8, ha="center")
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(0, 1000 * found["seconds"])
    axes.set_xlabel(
        "milliseconds. Numbers are a batch's tokens; pale is the share of a bar in which its thread had no core"
    )
    axes.axvline(1000 * found["bulk_at"], color="black", linewidth=1, linestyle="--")
    load = f"a request of {found['bulk_inputs']} texts, among {found['queries']} queries of {found['clients']} clients"
    title = f"{found['model']}: at the dashed line comes {load}, answered in {found['p50_ms']:.0f} ms (p50)"
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
