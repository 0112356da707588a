"""What the device setting means."""

from __future__ import annotations

import pytest

from service.errors import StartupError
from service.processes.devices import find_devices


def test_devices_of_a_list() -> None:
    assert find_devices("cpu, cpu,cpu") == ["cpu"] * 3
    with pytest.raises(StartupError, match="no device"):
        find_devices("cpu,gpu")
