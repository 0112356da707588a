"""The losses against what they are short for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_store.training.losses import TextBatch, distill_kl_div, margin_mse, texts_loss, token_losses
from model_store.training.objective import Objective


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


class Given(torch.nn.Module):
    """A model for sentence-transformers' losses, whose embeddings are given: each column's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return self.width


# Of float64 numbers; only the order of sums differs.
def assert_same(ours: tuple[Tensor, Tensor, Tensor], theirs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Losses, and gradients of queries and of passages."""
    assert ours[1].abs().max() > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def leaves(*shapes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shapes, dtype=torch.float64, generator=generator).requires_grad_()


B, N, D = 6, 3, 8


def batch_of(queries: Tensor, columns: Tensor, **teacher: Tensor) -> TextBatch:
    """`columns` is (N, B, D): the positives, then negatives, as sentence-transformers has them."""
    each, count = len(queries), len(columns)
    return TextBatch(
        queries,
        columns.transpose(0, 1).flatten(0, 1),
        torch.arange(each).repeat_interleave(count),
        (torch.arange(each * count) % count) == 0,
        **teacher,
    )


def ours(objective: Objective, **teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries, columns = leaves(B, D), leaves(N, B, D, seed=1)
    loss = texts_loss(batch_of(queries, columns, **teacher), objective)
    loss.backward()
    assert queries.grad is not None
    assert columns.grad is not None
    return loss.detach(), queries.grad, columns.grad


def theirs(make: Callable[[Any], Any], labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A loss of sentence-transformers on the same vectors, of length 1 as our own."""
    queries, columns = leaves(B, D), leaves(N, B, D, seed=1)
    features = [{"sentence_embedding": F.normalize(part, dim=-1)} for part in (queries, *columns)]
    loss = make(Given(D))(features, labels)
    loss.backward()
    assert queries.grad is not None
    assert columns.grad is not None
    return loss.detach(), queries.grad, columns.grad


def theirs_by_name(name: str, labels: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    return theirs(lambda model: getattr(losses, name)(model, **options), labels)


SCORES = torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_several_negatives_are_those_of_multiple_negatives_ranking_loss() -> None:
    assert_same(ours(Objective(scale=20.0)), theirs_by_name("MultipleNegativesRankingLoss", scale=20.0))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_widths_are_those_of_matryoshka_loss(weights: list[float] | None) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    dims = [8, 3, 5]
    found = ours(Objective(20.0, widths=tuple(zip(dims, weights or [1.0] * 3, strict=True))))
    ranking = losses.MultipleNegativesRankingLoss
    assert_same(found, theirs(lambda model: losses.MatryoshkaLoss(model, ranking(model, scale=20.0), dims, weights)))


@pytest.mark.parametrize(("kind", "temperature"), [("DistillKLDivLoss", 1.0), ("DistillKLDivLoss", 0.05)])
def test_kl_divergence_is_that_of_distill_kl_div_loss(kind: Any, temperature: float) -> None:
    objective = Objective(20.0, distillation=kind, contrastive_weight=0, student_temperature=temperature)
    expected = theirs_by_name(kind, SCORES, student_temperature=temperature)
    assert_same(ours(objective, scores=SCORES.flatten()), expected)


def test_margins_are_those_of_margin_mse_loss() -> None:
    objective = Objective(20.0, distillation="MarginMSELoss", contrastive_weight=0)
    assert_same(ours(objective, scores=SCORES.flatten()), theirs_by_name("MarginMSELoss", SCORES))


@pytest.mark.parametrize("widths", [(), ((8, 1.0), (4, 0.5))])
def test_a_teacher_s_vectors_are_met_as_by_embed_distill_loss(widths: tuple[tuple[int, float], ...]) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    taught = F.normalize(leaves(B, N + 1, D, seed=7).detach(), dim=-1)
    teacher = {"taught_queries": taught[:, 0], "taught_passages": taught[:, 1:].flatten(0, 1)}
    objective = Objective(20.0, distillation="EmbedDistillLoss", contrastive_weight=0, widths=widths)

    def make(model: Any) -> Any:
        loss = losses.EmbedDistillLoss(model)
        return losses.MatryoshkaLoss(model, loss, *map(list, zip(*widths, strict=True))) if widths else loss

    assert_same(ours(objective, **teacher), theirs(make, taught))


def test_a_teacher_s_cosines_are_scores_and_losses_are_weighed() -> None:
    taught = F.normalize(leaves(B, N + 1, D + 3, seed=7).detach(), dim=-1)
    teacher = {"taught_queries": taught[:, 0], "taught_passages": taught[:, 1:].flatten(0, 1)}
    both = Objective(20.0, distillation="DistillKLDivLoss", contrastive_weight=0.5, distillation_weight=3.0)
    cosines = (taught[:, :1] * taught[:, 1:]).sum(-1)
    contrast = theirs_by_name("MultipleNegativesRankingLoss", scale=20.0)
    distilled = theirs_by_name("DistillKLDivLoss", cosines)
    total = tuple(0.5 * one + 3.0 * other for one, other in zip(contrast, distilled, strict=True))
    assert_same(ours(both, **teacher), total)  # type: ignore[arg-type]


@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.1), ("absolute", -0.2), ("relative", 0.3)])
@pytest.mark.parametrize("guided", [False, True])
def test_false_negatives_are_left_out_as_in_gist_embed_loss(strategy: str, margin: float, guided: bool) -> None:
    """The guide is the teacher, or the trained vectors themselves."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    taught = F.normalize(leaves(B, N + 1, D, seed=7).detach(), dim=-1)
    teacher = {"taught_queries": taught[:, 0], "taught_passages": taught[:, 1:].flatten(0, 1)} if guided else {}
    margins: dict[str, Any] = {f"{strategy}_margin": margin}
    objective = Objective(20.0, **margins)
    queries, columns = leaves(B, D), leaves(N, B, D, seed=1)
    gist = losses.CachedGISTEmbedLoss.__new__(losses.CachedGISTEmbedLoss)
    torch.nn.Module.__init__(gist)
    settings = {"temperature": 1 / 20.0, "margin_strategy": strategy, "margin": margin, "mini_batch_size": B}
    off = dict.fromkeys(("contrast_anchors", "contrast_positives", "gather_across_devices", "show_progress_bar"), False)
    gist.__dict__ |= {**settings, **off}
    gist.similarity_fct, gist.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    guide = taught.unbind(1) if guided else [part.detach() for part in (queries, *columns)]
    loss = gist.calculate_loss([[part] for part in (queries, *columns)], [[part] for part in guide])
    loss.backward()
    assert queries.grad is not None
    assert columns.grad is not None
    found = ours(objective, **teacher)
    assert_same(found, (loss.detach(), queries.grad, columns.grad))
    assert found[0] < ours(Objective(20.0), **teacher)[0] - 0.01  # fewer negatives


def by_hand(batch: TextBatch, scale: float, absolute_margin: float) -> Tensor:
    """One pair of a query and a positive at a time."""
    queries, passages = (part / part.norm(dim=1, keepdim=True) for part in (batch.queries, batch.passages))
    total: Any = 0
    for number, query in enumerate(queries):
        own = [place for place, owner in enumerate(batch.owners.tolist()) if owner == number]
        positives = [place for place in own if batch.positive[place]]
        for place in positives:
            cosines = [query @ passage for passage in passages]
            bound = cosines[place].item() - absolute_margin
            negatives = [
                cosine for other, cosine in enumerate(cosines) if other not in positives and cosine.item() <= bound
            ]
            scores = torch.stack([cosines[place], *negatives]) * scale
            total = total - scores.log_softmax(0)[0] / len(positives)
    loss: Tensor = total / len(queries)
    return loss


@pytest.mark.parametrize("absolute_margin", [-2.0, 0.0])
def test_each_positive_is_found_among_all_that_are_no_positives_of_its_query(absolute_margin: float) -> None:
    """One to three positives and none to two negatives a query; a margin of −2 leaves nothing out."""
    owners = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    positive = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
    batch = TextBatch(leaves(4, D), leaves(10, D, seed=1), owners, positive)
    found = texts_loss(batch, Objective(20.0, absolute_margin=absolute_margin))
    torch.testing.assert_close(found, by_hand(batch, 20.0, absolute_margin))
    if absolute_margin == -2.0:
        torch.testing.assert_close(found, texts_loss(batch, Objective(20.0)))


def test_scores_of_unequal_numbers_of_passages() -> None:
    """Each query by itself."""
    owners = torch.tensor([0, 0, 1, 1, 1, 1])
    positive = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    student, teacher = leaves(2, 6).detach(), leaves(6, seed=1).detach()
    own = [student[0, :2], student[1, 2:]]
    taught = [teacher[:2], teacher[2:]]
    kl = [
        F.kl_div(one.log_softmax(0), other.softmax(0), reduction="sum") for one, other in zip(own, taught, strict=True)
    ]
    torch.testing.assert_close(distill_kl_div(student, teacher, owners), torch.stack(kl).mean())
    errors = [one - other for one, other in zip(own, taught, strict=True)]
    pairs = [errors[0][0] - errors[0][1], *(errors[1][p] - errors[1][n] for p in (0, 1) for n in (2, 3))]
    torch.testing.assert_close(margin_mse(student, teacher, owners, positive), torch.stack(pairs).square().mean())
