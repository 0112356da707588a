"""The devices that a setting names. `python -m service.processes.devices cuda:all` prints them, one a line.

It runs as a process of its own, so that the asking process does not keep torch in memory.
"""

from __future__ import annotations

import subprocess
import sys

from service.errors import StartupError
from service.logs import log

# Marks the lines on stderr that are for the log, as torch writes other lines there.
_WARNING = "warning: "


def find_devices(asked: str) -> list[str]:
    """The devices of a comma-separated list. An item may also be `auto`, or `cuda:all` for every GPU.

    Raises:
        StartupError: if a device does not exist here, or the devices are not of one type.
    """
    names = [name.strip() for name in asked.split(",")]
    if set(names) != {"cpu"}:  # the CPU is everywhere
        asking = [sys.executable, "-m", "service.processes.devices", *names]
        found = subprocess.run(asking, capture_output=True, text=True)
        lines = found.stderr.strip().splitlines()
        if found.returncode:
            raise StartupError(lines[-1])
        for line in lines:
            if line.startswith(_WARNING):
                log.warning(line.removeprefix(_WARNING))
        names = found.stdout.split()
    if len({device_type(name) for name in names}) > 1:
        raise StartupError(f"LLM2VEC_DEVICE is {asked!r}: vectors of different types of device are not quite the same")
    return names


def device_type(name: str) -> str:
    return name.partition(":")[0]


def main(names: list[str]) -> int:
    """Print the devices, or the reason on stderr why one does not exist. Returns the exit status."""
    # torch, from here on
    from model_store.encoder.devices import DeviceError, all_gpus, choose_device, cuda_fault, installed_driver

    try:
        for name in names:
            # Without any GPU, the error is about cuda:0.
            for one in (all_gpus() or ["cuda:0"]) if name == "cuda:all" else [name]:
                device = choose_device(one)
                print(device)
                if one == "auto" and device.type == "cpu" and installed_driver():
                    print(
                        f"{_WARNING}the CPU serves, although there is a driver for GPUs: {cuda_fault()}",
                        file=sys.stderr,
                    )
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
