"""Interactive work goes first, nothing is lost, and what is cancelled gives its turn on."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.batching.scheduling import Lane
from service.embedding.tokenizer_pool import TokenizerPool
from tests.service.fakes import until


class Gate:
    """Work that waits until it is let through, and notes the order in which it began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._open = threading.Event()

    def work(self, name: str) -> str:
        self.begun.append(name)
        assert self._open.wait(10)
        return name

    def let_through(self) -> None:
        self._open.set()


@pytest.mark.parametrize("threads", [1, 2])
async def test_interactive_work_goes_before_bulk_that_waits(threads: int) -> None:
    pool, gate = TokenizerPool(threads), Gate()

    def start(lane: Lane, name: str) -> asyncio.Task[str]:
        return asyncio.create_task(pool.run(lane, lambda: gate.work(name)))

    bulk = [start("bulk", f"bulk {number}") for number in range(8)]
    await until(lambda: len(gate.begun) == threads)
    queries = [start("interactive", f"query {number}") for number in range(3)]
    await asyncio.sleep(0)
    gate.let_through()
    names = await asyncio.gather(*bulk, *queries)
    assert names == [*(f"bulk {n}" for n in range(8)), *(f"query {n}" for n in range(3))]
    assert set(gate.begun[threads : threads + 3]) == {"query 0", "query 1", "query 2"}
    assert await pool.run("bulk", lambda: "more") == "more"
    pool.close()


async def test_who_is_cancelled_gives_the_turn_on() -> None:
    pool, gate = TokenizerPool(1), Gate()
    first = asyncio.create_task(pool.run("bulk", lambda: gate.work("first")))
    await until(lambda: gate.begun == ["first"])
    waiting = [asyncio.create_task(pool.run("interactive", lambda n=n: gate.work(f"{n}"))) for n in range(3)]  # type: ignore[misc]
    await asyncio.sleep(0)
    waiting[0].cancel()
    gate.let_through()
    await first
    waiting[1].cancel()  # its turn may have come, and it may have begun
    assert await waiting[2] == "2"
    assert "0" not in gate.begun
    assert await pool.run("bulk", lambda: "more") == "more"
    pool.close()


async def test_errors_reach_who_asked_and_free_the_thread() -> None:
    pool = TokenizerPool(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await pool.run("bulk", lambda: 1 // 0)
    assert await pool.run("interactive", lambda: 1) == 1
    pool.close()
