"""The bound on what all requests and their answers hold together."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from service.embedding.in_flight import InFlight, hold, hold_vectors
from service.errors import TooMuchInFlight
from tests.service.fakes import WIDTH, Server, until


def test_requests_hold_so_much_together_and_give_it_back() -> None:
    in_flight = InFlight(100)
    with in_flight.request():
        hold(60)
        hold(40)
        assert in_flight.bytes == 100
    assert in_flight.bytes == 0


async def test_another_request_finds_what_is_left() -> None:
    in_flight = InFlight(100)
    held, done = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        with in_flight.request():
            hold(70)
            held.set()
            await done.wait()

    async def second() -> None:
        with in_flight.request():
            hold(30)
            with pytest.raises(
                TooMuchInFlight, match=r"100 bytes together, of at most 100 .*LLM2VEC_MAX_BYTES_IN_FLIG"
            ):
                hold(1)

    waiting = asyncio.create_task(first())
    await held.wait()
    await asyncio.create_task(second())
    assert in_flight.bytes == 70
    done.set()
    await waiting
    assert in_flight.bytes == 0


def test_one_that_is_alone_may_hold_any_number() -> None:
    in_flight = InFlight(100)
    with in_flight.request():
        hold(1000)
        hold(1000)
    in_flight.unsent_bytes = 1  # not alone: somebody has not read an answer yet
    with in_flight.request(), pytest.raises(TooMuchInFlight):
        hold(1000)


def test_outside_a_request_nothing_is_counted() -> None:
    hold(1 << 62)
    hold_vectors(1 << 62)


def test_what_a_failed_request_held_is_given_back() -> None:
    in_flight = InFlight(100)
    with ExitStack() as ends:
        ends.enter_context(pytest.raises(RuntimeError))
        ends.enter_context(in_flight.request())
        hold(50)
        raise RuntimeError
    assert in_flight.bytes == 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/v2/embed", "/api/embed", "/tokenize"])
async def test_bodies_are_counted_together(path: str) -> None:
    server = Server(max_bytes_in_flight=20_000)
    fields = {"/v1/embeddings": "input", "/v2/embed": "texts", "/api/embed": "input"}
    async with server.running() as client:
        server.worker.gate.clear()
        first = asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a" * 100] * 100}))
        await until(lambda: server.worker.batches)
        assert server.app.state.parts.in_flight.bytes > 10_000
        body = {fields.get(path, "inputs"): ["b" * 100] * 100, "input_type": "search_document", "model": "fake"}
        refused = await client.post(path, json=body)
        assert refused.status_code == 429, refused.text
        assert "LLM2VEC_MAX_BYTES_IN_FLIGHT" in refused.text
        assert refused.headers["retry-after"] == "1"
        server.worker.gate.set()
        assert (await first).status_code == 200
        assert server.app.state.parts.in_flight.bytes == 0
        assert (await client.post(path, json=body)).status_code == 200
        assert server.app.state.parts.in_flight.bytes == 0


async def test_the_vectors_of_answers_are_counted_before_they_are_computed() -> None:
    server = Server(max_bytes_in_flight=24 * WIDTH * 400)
    async with server.running() as client:
        server.worker.gate.clear()
        first = asyncio.create_task(client.post("/embed_all", json={"inputs": "a" * 300}))
        await until(lambda: server.worker.batches)
        refused = await client.post("/embed_all", json={"inputs": "b" * 300})
        assert refused.status_code == 429
        server.worker.gate.set()
        assert (await first).status_code == 200
        assert len(server.worker.batches) == 1
        assert (await client.post("/embed_all", json={"inputs": "b" * 300})).status_code == 200


async def test_a_client_that_hangs_up_gives_back_what_it_held() -> None:
    server = Server()
    async with server.running() as client:
        server.worker.gate.clear()
        asked = asyncio.create_task(client.post("/v1/embeddings", json={"input": "a" * 400}))
        await until(lambda: server.worker.batches)
        assert server.app.state.parts.in_flight.bytes > 400
        asked.cancel()
        await until(lambda: not server.app.state.parts.in_flight.bytes)
        server.worker.gate.set()


def test_metrics_tell_what_is_held() -> None:
    server = Server()
    with server.client:
        assert server.embed(input="a").status_code == 200
        assert server.metric("llm2vec_bytes_in_flight") == 0
        server.app.state.parts.in_flight.unsent_bytes = 7
        assert server.metric("llm2vec_bytes_in_flight") == 7
