"""AdamW on float32 copies of 16-bit parameters.

A 16-bit parameter changes in steps of about 1/256 of its size. Most updates are smaller and would be lost. So the
updates are summed in a copy, and the parameter is the rounded copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class MasterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) whose parameter groups are the copies; float32 parameters need no copy."""

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        self._parameters = list(parameters)
        self._masters = [
            parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for parameter in self._parameters
        ]
        super().__init__(self._masters, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the copies by the parameters' gradients, and then the parameters by the copies."""
        pairs = [pair for pair in zip(self._parameters, self._masters, strict=True) if pair[0] is not pair[1]]
        for parameter, master in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        super().step(closure)
        for parameter, master in pairs:
            parameter.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the parameters' gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's own state and the copies: only they hold the digits that the parameters have rounded away."""
        return {**super().state_dict(), "masters": [master.detach().clone() for master in self._masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`, and set the parameters from the copies."""
        state = dict(state_dict)
        for parameter, master, stored in zip(self._parameters, self._masters, state.pop("masters"), strict=True):
            master.copy_(stored)
            parameter.copy_(master)
        super().load_state_dict(state)
