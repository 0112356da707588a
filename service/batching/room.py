"""Room in a queue, and the line of those who wait for room. It knows nothing of the queue's content."""

from __future__ import annotations

import asyncio
from bisect import insort_right
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from service.errors import Overloaded

T = TypeVar("T")


def has_room(tokens: int, waiting: int, most: int | None) -> bool:
    """Whether this many tokens may join those that wait. An empty queue takes one request of any size."""
    return most is None or not waiting or waiting + tokens <= most


@dataclass(eq=False)
class _Place:
    since: float
    turn: asyncio.Future[None]


class Line:
    """First come, first served: whenever there may be room, only the first in the line tries. Nobody overtakes.

    A small request waits behind a large one that does not fit yet: otherwise small ones would keep it out for ever.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []

    def is_before(self, since: float) -> bool:
        """Whether somebody in the line arrived before this time."""
        return bool(self._places) and self._places[0].since < since

    async def wait(self, since: float, attempt: Callable[[], T], seconds: float) -> T:
        """The result of the first attempt that finds room. Attempts begin when the line is next called.

        `since` is the time of arrival: a request that joins a second time gets its old place.

        Raises:
            TimeoutError: if there is no room in time.
            Exception: any error of the attempt, except Overloaded.
        """
        loop = asyncio.get_running_loop()
        place = _Place(since, loop.create_future())
        insort_right(self._places, place, key=attrgetter("since"))
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await place.turn
                    place.turn = loop.create_future()
                    if self._places[0] is place:
                        try:
                            return attempt()
                        except Overloaded:
                            pass
        finally:
            was_first = self._places[0] is place
            self._places.remove(place)
            if was_first:  # even after an error: the next one may need less room
                self.call()

    def call(self) -> None:
        """Let the first in the line try, as there may be room."""
        if self._places and not self._places[0].turn.done():
            self._places[0].turn.set_result(None)
