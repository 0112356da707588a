"""The two losses: masked tokens against the vocabulary, and texts against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# N masked tokens, V vocabulary, D width, B queries

# The most logits in memory at a time.
_LOGITS = 1 << 25


def token_losses(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, at_once: int = _LOGITS
) -> tuple[Tensor, Tensor]:
    """(N,) float32 cross-entropies of `targets` (N,), and (N,) bool: whether each target was the most likely token.

    `hidden` is (N, D); the output head is (V, D) and gets no gradient. Logits are products in the head's dtype, with
    soft-capping if the model has it; their sums are float32. Only `at_once` logits are in memory at a time: as the head
    learns nothing, the gradient of `hidden` is computed together with the loss.
    """
    result: tuple[Tensor, Tensor] = _TokenLosses.apply(hidden, head, targets, softcap, at_once)  # type: ignore[no-untyped-call]
    return result


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, at_once: int
    ) -> tuple[Tensor, Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        rows = max(at_once // len(head), 1)
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            right = targets[block, None]
            logits = F.linear(hidden[block], head)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            scores = logits.float()
            sums = scores.logsumexp(1, keepdim=True)
            of_right = scores.gather(1, right)
            losses[block] = (sums - of_right)[:, 0]
            hits[block] = (of_right == scores.amax(1, keepdim=True))[:, 0]
            if gradient is not None:
                slope = (scores if softcap is None else scores.clone()).sub_(sums).exp_()
                slope.scatter_add_(1, right, slope.new_full((), -1.0).expand_as(right))
                if softcap is not None:
                    slope.mul_(1 - (scores / softcap).square())
                gradient[block] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None, None


def contrastive_loss(parts: Sequence[Tensor], scale: float) -> Tensor:
    """`in_batch_loss` over the texts of all processes. Each process must give the same number of texts.

    In each process only its own texts carry a gradient, multiplied by the number of processes, because data parallelism
    divides by that number. So the value and the gradient are those of one process with the whole batch.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        return in_batch_loss(parts, scale)
    loss = in_batch_loss([_gather(part) for part in parts], scale)
    return loss + (processes - 1) * (loss - loss.detach())


def in_batch_loss(parts: Sequence[Tensor], scale: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) over cosines · `scale`: each query must find its positive among all texts.

    `parts` are queries, positives and, if there are any, hard negatives: (B, D) each.
    """
    queries, passages = F.normalize(parts[0], dim=1), F.normalize(torch.cat(list(parts[1:])), dim=1)
    return F.cross_entropy(queries @ passages.T * scale, torch.arange(len(queries), device=queries.device))


def _gather(own: Tensor) -> Tensor:
    """The rows of all processes, in order. Only this process's rows carry a gradient. All must have the same number."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)
