"""The losses against what they are short for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_store.training.losses import in_batch_loss, token_losses


def naive(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("at_once", [1 << 25, 7 * 50])
def test_token_losses_are_those_of_all_logits(softcap: float | None, at_once: int) -> None:
    """In one block and in blocks of 7 rows; each token's loss weighed differently, as a gradient would show."""
    torch.manual_seed(0)
    head, targets, weights = torch.randn(50, 16), torch.randint(50, (30,)), torch.rand(30)
    ours, theirs = (torch.randn(30, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    losses, hits = token_losses(ours, head, targets, softcap, at_once)
    expected = naive(theirs, head, targets, softcap)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(hits, (theirs @ head.T).argmax(1) == targets)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_token_losses_in_bfloat16_stay_near_those_in_float32() -> None:
    """Products are rounded to 8 bits, sums are not: 4,000 logits of about ±4 leave an error of about 2^-8 · 4."""
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(64, 64), torch.randn(4000, 64) / 16, torch.randint(4000, (64,))
    exact = naive(hidden.bfloat16().float(), head.bfloat16().float(), targets, None)
    losses, _ = token_losses(hidden.bfloat16(), head.bfloat16(), targets)
    assert losses.dtype == torch.float32
    assert (losses - exact).abs().max() < 0.02


def test_no_hidden_token_is_no_loss() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    losses, hits = token_losses(hidden, torch.randn(20, 8), torch.empty(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == hits.shape == (0,)


def by_hand(parts: list[Tensor], scale: float) -> Tensor:
    """One query at a time."""
    queries, *passages = [part / part.norm(dim=1, keepdim=True) for part in parts]
    total: Any = 0
    for number, query in enumerate(queries):
        scores = torch.stack([query @ passage * scale for part in passages for passage in part])
        total = total - scores.log_softmax(0)[number]
    mean: Tensor = total / len(queries)
    return mean


@pytest.mark.parametrize("negatives", [False, True])
def test_a_query_must_find_its_own_among_all(negatives: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3 if negatives else 2)]
    torch.testing.assert_close(in_batch_loss(parts, 20.0), by_hand(parts, 20.0))
