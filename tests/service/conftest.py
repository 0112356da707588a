"""What most of these tests ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.fakes import Server


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.client:
        yield server
