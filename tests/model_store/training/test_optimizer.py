"""AdamW with float32 copies."""

from __future__ import annotations

import copy

import torch

from model_store.training.optimizer import MasterAdamW


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=generator).bfloat16() for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: list[torch.Tensor]) -> None:
    for gradient in steps:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        assert parameter.grad is None


def test_the_copies_are_adamw_in_float32() -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, rounded = start.float().requires_grad_(), start.clone().requires_grad_()
    options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.98)}
    run(torch.optim.AdamW([exact], **options), exact, gradients(20))  # type: ignore[arg-type]
    run(MasterAdamW([rounded], **options), rounded, gradients(20))
    assert torch.equal(rounded, exact.bfloat16())


def test_updates_below_a_parameter_s_step_are_not_lost() -> None:
    """At 1, bfloat16 has steps of 1/128 upwards; a thousand updates of 1/10,000 are thirteen of them."""
    parameter = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    plain = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    ones = [-torch.ones(1, dtype=torch.bfloat16)] * 1000
    run(MasterAdamW([parameter], lr=1e-4, weight_decay=0.0), parameter, ones)
    run(torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0), plain, ones)
    assert plain.item() == 1.0  # the control
    assert abs(parameter.item() - 1.1) < 0.01


def test_a_float32_parameter_is_its_own_copy() -> None:
    one, other = (torch.ones(6, 4, requires_grad=True) for _ in range(2))
    run(MasterAdamW([one], lr=1e-3), one, gradients(5))
    run(torch.optim.AdamW([other], lr=1e-3), other, gradients(5))
    assert torch.equal(one, other)


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    first = whole.detach().clone().requires_grad_()
    steps = gradients(9)
    run(MasterAdamW([whole], lr=1e-3), whole, steps)
    stopped = MasterAdamW([first], lr=1e-3)
    run(stopped, first, steps[:4])
    state = copy.deepcopy(stopped.state_dict())
    second = torch.zeros(6, 4, dtype=torch.bfloat16, requires_grad=True)
    resumed = MasterAdamW([second], lr=1e-3)
    resumed.load_state_dict(state)
    assert torch.equal(first, second)
    run(resumed, second, steps[4:])
    assert torch.equal(whole, second)
