"""The losses as functions of tensors: masked tokens against the vocabulary, and texts against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model_store.training.objective import Distillation, Objective

# N masked tokens, V vocabulary, D width, W a teacher's width, B queries, P passages, M of them positives

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


@dataclass(frozen=True)
class TextBatch:
    """Vectors of `queries` (B, D) and of all their `passages` (P, D), as many for each query as it has.

    `owners` (P,) is the query to which each passage belongs, and `positive` (P,) bool says which passages it must find.
    `scores` (P,) are a teacher's for each passage and its query; the others are a teacher's vectors, (B, W) and (P, W),
    of length 1. They are None without such a teacher.
    """

    queries: Tensor
    passages: Tensor
    owners: Tensor
    positive: Tensor
    scores: Tensor | None = None
    taught_queries: Tensor | None = None
    taught_passages: Tensor | None = None


def contrastive_loss(batch: TextBatch, objective: Objective) -> Tensor:
    """`texts_loss` over the texts of all processes. Each process must give the same number of queries.

    In each process only its own texts carry a gradient, multiplied by the number of processes, because data parallelism
    divides by that number. So the value and the gradient are those of one process with the whole batch.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        return texts_loss(batch, objective)
    parts = {name: _gather(part) for name, part in vars(batch).items() if part is not None}
    own_first = torch.arange(processes, device=batch.owners.device) * len(batch.queries)
    owners = parts.pop("owners") + own_first.repeat_interleave(_counts(batch.owners))
    loss = texts_loss(TextBatch(owners=owners, **parts), objective)
    return loss + (processes - 1) * (loss - loss.detach())


def texts_loss(batch: TextBatch, objective: Objective) -> Tensor:
    """The weighted sum of the losses at each width (Kusupati et al. 2022), to which vectors are cut.

    False negatives are told by the whole vectors at every width.
    """
    left_out = false_negatives(batch, objective.absolute_margin, objective.relative_margin)
    total = torch.zeros((), device=batch.queries.device)
    for width, weight in objective.widths or ((batch.queries.shape[1], 1.0),):
        queries, passages = (F.normalize(part[:, :width], dim=1) for part in (batch.queries, batch.passages))
        cosines = queries @ passages.T  # (B, P)
        loss = total.new_zeros(())
        if objective.contrastive_weight:
            found = info_nce(cosines * objective.scale, batch.owners, batch.positive, left_out)
            loss = loss + objective.contrastive_weight * found
        if objective.distillation:
            loss = loss + objective.distillation_weight * _distilled(batch, queries, passages, cosines, objective)
        total = total + weight * loss
    return total


def info_nce(scores: Tensor, owners: Tensor, positive: Tensor, left_out: Tensor | None = None) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): each query must find each of its positives among all passages but these.

    `scores` is (B, P). Other positives of the query are no negatives, nor are those of `left_out` (M, P). A query
    counts once, however many positives it has.
    """
    targets = positive.nonzero()[:, 0]  # (M,)
    queries = owners[targets]
    others = (owners == queries[:, None]) & positive
    ignored = others if left_out is None else others | left_out
    ignored = ignored.scatter(1, targets[:, None], False)
    losses = F.cross_entropy(scores[queries].masked_fill(ignored, -torch.inf), targets, reduction="none")
    return (losses / queries.bincount()[queries]).sum() / len(scores)


def false_negatives(batch: TextBatch, absolute_margin: float | None, relative_margin: float | None) -> Tensor | None:
    """(M, P) bool: the passages too near to the query to be negatives beside each positive; None without margins.

    They are those with a cosine above that of the positive less the margin, as in sentence-transformers' GISTEmbedLoss.
    The cosines are the teacher's if it gives vectors, else those that are trained.
    """
    if absolute_margin is None and relative_margin is None:
        return None
    queries, passages = batch.taught_queries, batch.taught_passages
    if queries is None or passages is None:
        queries, passages = (F.normalize(part.detach(), dim=1) for part in (batch.queries, batch.passages))
    targets = batch.positive.nonzero()
    cosines = queries[batch.owners[targets[:, 0]]] @ passages.T  # (M, P)
    own = cosines.gather(1, targets)
    bounds = [] if absolute_margin is None else [own - absolute_margin]
    bounds += [] if relative_margin is None else [own - own.abs() * relative_margin]
    return cosines > torch.cat(bounds, 1).amin(1, keepdim=True)


def distill_kl_div(student: Tensor, teacher: Tensor, owners: Tensor) -> Tensor:
    """The mean over queries of KL(teacher ‖ student), each a softmax over the query's own passages.

    `student` is (B, P) and `teacher` (P,): scores, divided by their temperatures.
    """
    others = owners != torch.arange(len(student), device=owners.device)[:, None]
    predicted = student.masked_fill(others, -torch.inf).log_softmax(1).masked_fill(others, 0.0)
    wanted = teacher.expand_as(student).masked_fill(others, -torch.inf).softmax(1)
    return F.kl_div(predicted, wanted, reduction="batchmean")


def margin_mse(student: Tensor, teacher: Tensor, owners: Tensor, positive: Tensor) -> Tensor:
    """The mean squared error of each query's margins between a positive and a negative; arguments as above."""
    error = student[owners, torch.arange(len(owners), device=owners.device)] - teacher
    pairs = (owners[:, None] == owners) & positive[:, None] & ~positive
    return (error[:, None] - error)[pairs].square().mean()


def _distilled(batch: TextBatch, queries: Tensor, passages: Tensor, cosines: Tensor, objective: Objective) -> Tensor:
    kind: Distillation | None = objective.distillation
    taught_queries, taught_passages = batch.taught_queries, batch.taught_passages
    if taught_queries is not None and taught_passages is not None:
        if kind == "EmbedDistillLoss":
            taught = torch.cat([taught_queries, taught_passages])[:, : queries.shape[1]]
            return (1 - F.cosine_similarity(torch.cat([queries, passages]), taught)).mean()
        teacher = (taught_queries[batch.owners] * taught_passages).sum(1)
    else:
        assert batch.scores is not None, "the reader refuses examples without scores"
        teacher = batch.scores
    student, teacher = cosines / objective.student_temperature, teacher / objective.teacher_temperature
    if kind == "MarginMSELoss":
        return margin_mse(student, teacher, batch.owners, batch.positive)
    return distill_kl_div(student, teacher, batch.owners) * objective.student_temperature**2


def _counts(own: Tensor) -> Tensor:
    """The number of rows that each process has."""
    count = torch.tensor([len(own)], device=own.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    return torch.cat(counts)


def _gather(own: Tensor) -> Tensor:
    """The rows of all processes, in order. Only this process's rows carry a gradient."""
    counts = _counts(own).tolist()
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    whole = [part[:count] for part, count in zip(parts, counts, strict=True)]
    whole[dist.get_rank()] = own
    return torch.cat(whole)
