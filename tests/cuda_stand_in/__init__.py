"""A CUDA that is not there, for a torch without it: the CUDA path runs on the CPU, step by step as on a GPU.

`install` replaces what torch says of its GPUs, and streams, events, graphs and pinned memory. Whatever is put on a GPU
stays on the CPU, so a copy that is forgotten does not show here: fake tensors do that (test_fake_cuda.py). What does
show is a device without its index, a thread that never chose its device, a wait for the device while a graph is
captured, and a call that the flash kernel would refuse. A captured graph is a list of operations, which a replay runs
again on the same tensors, as a GPU would.

Other processes have it with `environment(…)`, by way of `site/sitecustomize.py`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

VARIABLE = "CUDA_STAND_IN"

_ROOT = Path(__file__).parents[2]

# Functions that make a tensor on a device that they are told.
_FACTORIES = (
    "empty",
    "empty_like",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "rand",
    "randn",
    "randint",
)

# The device waits for the host, or the host for the device: neither can be captured.
_WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::unique", "aten::masked_select")


@dataclass
class Gpus:
    """What the GPUs are said to be, and what was done with them."""

    count: int = 1
    capability: tuple[int, int] = (9, 0)
    name: str = "Stand-in GPU"
    memory: int = 80 << 30
    current: dict[str, int] = field(default_factory=dict)  # by the name of the thread that chose it
    done: Counter[str] = field(default_factory=Counter)


def environment(count: int = 1, capability: tuple[int, int] = (9, 0)) -> dict[str, str]:
    """What a process has to find in its environment to have so many GPUs."""
    path = [str(Path(__file__).parent / "site"), str(_ROOT)]
    return {VARIABLE: f"{count},{capability[0]},{capability[1]}", "PYTHONPATH": os.pathsep.join(path)}


def install_from_environment() -> None:
    """What `environment` asks for."""
    if asked := os.environ.get(VARIABLE):
        count, major, minor = map(int, asked.split(","))
        install(Gpus(count, (major, minor)), setattr)


def install(gpus: Gpus, patch: Callable[[Any, str, Any], None]) -> Gpus:
    """Have torch use these; `patch(object, name, value)` is `setattr`, or pytest's, which undoes it."""
    cuda: Any = torch.cuda

    def properties(device: Any = None) -> Any:
        return SimpleNamespace(
            name=gpus.name,
            total_memory=gpus.memory,
            major=gpus.capability[0],
            minor=gpus.capability[1],
            multi_processor_count=132,
        )

    def set_device(device: Any) -> None:
        gpus.current[threading.current_thread().name] = cuda._utils._get_device_index(device)

    for name, value in {
        "is_available": lambda: gpus.count > 0,
        "device_count": lambda: gpus.count,
        "get_device_capability": lambda device=None: gpus.capability,
        "get_device_name": lambda device=None: gpus.name,
        "get_device_properties": properties,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "set_device": set_device,
        "current_device": lambda: gpus.current.get(threading.current_thread().name, 0),
        "init": lambda: None,
        "synchronize": lambda device=None: gpus.done.update(["synchronize"]),
        "empty_cache": lambda: gpus.done.update(["empty_cache"]),
        "memory_allocated": lambda device=None: 1 << 20,
        "memory_reserved": lambda device=None: 1 << 21,
        "max_memory_allocated": lambda device=None: 1 << 21,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (gpus.memory, gpus.memory),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "Stream": _Stream,
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: nullcontext(),
        "Event": lambda **options: _Event(gpus, **options),
        "CUDAGraph": Graph,
        "graph": lambda graph, pool=None: capture(gpus, graph),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": _SyncDebugMode().set,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        patch(cuda, name, value)
    patch(torch.version, "cuda", "13.0")
    _device._device_constructors()  # torch notes its own functions, before they are replaced
    for name in _FACTORIES:
        patch(torch, name, _on_the_cpu(getattr(torch, name)))
    patch(torch.Tensor, "to", _on_the_cpu(torch.Tensor.to))
    patch(torch.Tensor, "pin_memory", lambda tensor: tensor)
    enter = _device.DeviceContext.__init__
    patch(_device.DeviceContext, "__init__", lambda context, device: enter(context, _cpu_for(device)))
    _emulate_flash()
    return gpus


def _cpu_for(device: Any) -> Any:
    is_cuda = isinstance(device, torch.device | str) and torch.device(device).type == "cuda"
    return torch.device("cpu") if is_cuda else device


def _on_the_cpu(function: Any) -> Any:
    @wraps(function)
    def made(*arguments: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        arguments = tuple(_cpu_for(each) if isinstance(each, torch.device) else each for each in arguments)
        return function(*arguments, **{name: _cpu_for(each) for name, each in options.items()})

    return made


class _Stream:
    """Work is done when it is asked for: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """Nothing to do."""


class _Event:
    def __init__(self, gpus: Gpus, blocking: bool = False, enable_timing: bool = False) -> None:
        self._gpus = gpus
        self._kind = "blocking" if blocking else "timing" if enable_timing else "spinning"

    def record(self, stream: Any = None) -> None:
        self._gpus.done[f"event recorded, {self._kind}"] += 1

    def synchronize(self) -> None:
        self._gpus.done[f"event awaited, {self._kind}"] += 1

    def elapsed_time(self, end: Any) -> float:
        return 0.01


class Graph:
    """Operations and the tensors that they read and wrote."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def replay(self) -> None:
        """Run them again; results go to where they went before."""
        for operation, arguments, options, results in self.steps:
            again = operation(*arguments, **options)
            for before, now in zip(results, _tensors_in(again), strict=True):
                if before.data_ptr() != now.data_ptr():
                    before.copy_(now)


class _NoWaits(TorchDispatchMode):
    """Refuses operations for which the host would wait for the device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.name().partition(".")[0] in _WAITS:
            raise RuntimeError(f"called a synchronizing CUDA operation: {operation.name()}")
        return operation(*args, **(kwargs or {}))


class _SyncDebugMode:
    """`torch.cuda.set_sync_debug_mode`, of one thread."""

    def __init__(self) -> None:
        self._active: ExitStack | None = None

    def set(self, mode: int | str) -> None:
        if self._active is not None:
            self._active.close()
            self._active = None
        if mode == "error":
            self._active = ExitStack()
            self._active.enter_context(torch.compiler.set_stance("force_eager"))
            self._active.enter_context(_NoWaits())  # type: ignore[no-untyped-call]


class _Recorder(_NoWaits):
    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(operation, types, args, kwargs)
        self._graph.steps.append((operation, args, kwargs or {}, _tensors_in(found)))
        return found


def _tensors_in(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [part for part in found if isinstance(part, Tensor)] if isinstance(found, tuple | list) else []


@contextmanager
def capture(gpus: Gpus, graph: Graph) -> Iterator[None]:
    """As `torch.cuda.graph`, but what is captured is also done, and compiled layers run as they were written."""
    gpus.done["capture"] += 1
    with torch.compiler.set_stance("force_eager"), _Recorder(graph):
        yield


_emulation: list[Any] = []


def _emulate_flash() -> None:
    """Give the CPU the operation that only CUDA has."""
    if not _emulation:
        library = torch.library.Library("aten", "IMPL")
        library.impl("_flash_attention_forward", flash_attention_forward, "CPU")
        _emulation.append(library)


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    """Attention in float32, one text after the other; refuses what the kernel refuses (flash_api.cpp, torch 2.11)."""
    assert cum_seq_q is not None
    assert cum_seq_k is not None
    _require(query.dtype in (torch.bfloat16, torch.float16), f"dtype {query.dtype}")
    _require(query.dtype == key.dtype == value.dtype, "dtypes that differ")
    width = query.shape[-1]
    _require(width <= 256 and width % 8 == 0, f"heads of {width} numbers")
    _require(query.shape[1] % key.shape[1] == 0, "query heads that are no multiple of the key heads")
    _require(all(part.stride(-1) == 1 for part in (query, key, value)), "a last dimension that is not contiguous")
    for offsets in (cum_seq_q, cum_seq_k):
        _require(offsets.dtype == torch.int32 and offsets.is_contiguous(), f"offsets of {offsets.dtype}")
    bounds = cum_seq_q.tolist()
    longest = max(end - start for start, end in pairwise(bounds))
    _require(max_q == max_k >= max(longest, 2), f"a longest text of {max_q}, which has {longest} tokens")
    _require(not (dropout_p or return_debug_mask or any(others.values())), "options that are not used here")
    _require(window_size_right == (0 if is_causal else window_size_left), "a window of two widths")
    _require(bounds[0] == 0 and bounds[-1] == len(query), "offsets that are not of the row")
    out = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for start, end in pairwise(bounds):
        q = query[start:end].float().transpose(0, 1)
        k, v = (part[start:end].float().transpose(0, 1).repeat_interleave(group, 0) for part in (key, value))
        scores = q @ k.transpose(1, 2) * (width**-0.5 if scale is None else scale)
        at = torch.arange(end - start)
        behind = at[:, None] - at
        if window_size_left is not None:
            scores = scores.masked_fill(behind > window_size_left, float("-inf"))
        if window_size_right is not None:
            scores = scores.masked_fill(behind < -window_size_right, float("-inf"))
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    sums = query.new_empty((query.shape[1], len(query)), dtype=torch.float32)
    return out, sums, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), query.new_empty(0)


def _require(holds: bool, refused: str) -> None:
    if not holds:
        raise RuntimeError(f"the flash kernel refuses {refused}")
