"""What is trained, against transformers' own padded models: losses, and every adapter's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_store.build.sources import Source
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TokenizedText
from model_store.training.decoder import TrainableDecoder, load_trainable
from model_store.training.examples import NO_LABEL, MaskedBatches, Masking, TokenRows
from model_store.training.losses import TextBatch, contrastive_loss
from model_store.training.objective import Objective
from model_store.training.stages import ContrastiveEncoder, MaskedNextToken
from tests.tiny import FAMILIES, VOCABULARY, random_rows, save_base

# Around a window's length, and several of them.
LENGTHS = [2, 9, 16, 17, 33, 70]


# float32 sums in another order; gradients are of size 0.01 to 10.
def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def trainable(folder: Path, family: str, seed: int = 0, **options: Any) -> TrainableDecoder:
    """A tiny base's decoder with adapters that do something: a new adapter's B is zero, and A then has no gradient."""
    if not folder.exists():
        save_base(folder, family, head=True)
    torch.manual_seed(seed)
    decoder = load_trainable(
        Source(str(folder), folder),
        (),
        torch.float32,
        torch.device("cpu"),
        **{
            "rank": 4,
            "lora_dropout": 0.0,
            "attention_dropout": 0.0,
            "gradient_checkpointing": False,
            "with_head": True,
            **options,
        },
    )
    for name, parameter in decoder.adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return decoder


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    module.zero_grad()
    return found


def padded(decoder: TrainableDecoder, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, S, D) hidden states and the (B, S) mask, of transformers' eager attention over padded rows."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    model = decoder.adapted.base_model.model
    packed = model.config._attn_implementation
    model.set_attn_implementation("eager")
    causal = model.config.is_causal
    hidden = model(input_ids=ids, attention_mask=mask, is_causal=causal, use_cache=False).last_hidden_state
    model.set_attn_implementation(packed)
    return hidden, mask


def masked_batch(family: str) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    rows = TokenRows([np.array(row.token_ids, dtype=np.int32) for row in random_rows(LENGTHS)])
    untouched = np.zeros(VOCABULARY, dtype=bool)
    masking = Masking(5, 0.3, True, untouched, seed=0)
    masked = [masking.of(*rows[(0, index)]) for index in range(len(rows))]
    batch = MaskedBatches(masking)([rows[(0, index)] for index in range(len(rows))])
    return batch, [shown.tolist() for shown, _ in masked], [labels.tolist() for _, labels in masked]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mntp_is_the_loss_of_all_logits_of_a_padded_batch_and_so_is_its_gradient(
    family: str, attention: str, tmp_path: Path
) -> None:
    """Naively: every logit of every token, shifted by one, labels of hidden tokens alone."""
    decoder = trainable(tmp_path / "base", family, attention=attention)
    stage = MaskedNextToken(decoder).train()
    batch, shown, labels = masked_batch(family)
    losses, hits = stage(**batch)
    losses.sum().backward()
    ours = gradients(stage)

    hidden, _ = padded(decoder, shown)
    embeddings = decoder.adapted.base_model.model.embed_tokens.weight
    logits = hidden @ (embeddings if decoder.head is None else decoder.head).T
    if (cap := getattr(decoder.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    targets = torch.full(logits.shape[:2], NO_LABEL)
    for number, row in enumerate(labels):
        targets[number, : len(row)] = torch.tensor(row)
    naive = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
    naive.sum().backward()
    wanted = targets[:, 1:].flatten() != NO_LABEL
    assert_close(losses, naive[wanted])
    assert torch.equal(hits, (logits[:, :-1].argmax(-1) == targets[:, 1:]).flatten()[wanted])
    theirs = gradients(stage)
    assert len(ours) == len(theirs) == 2 * len(decoder.adapted.peft_config["default"].target_modules) * 3
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name])
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_base_s_own(family: str, tmp_path: Path) -> None:
    """Tied to the embeddings, or stored beside them."""
    decoder = trainable(tmp_path / "base", family)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    if decoder.config.tie_word_embeddings:
        assert decoder.head is None
        assert torch.equal(decoder.adapted.base_model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    else:
        assert decoder.head is not None
        assert torch.equal(decoder.head, stored["lm_head.weight"])


def test_a_base_without_its_head_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "llama", head=True)
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(ValueError, match="holds no output head"):
        trainable(tmp_path / "base", "llama")


def chunk(rows: list[TokenizedText]) -> dict[str, Any]:
    return dict(vars(PackedBatch.pack(rows, "mean")))


def chunks(rows: list[TokenizedText], size: int) -> list[dict[str, Any]]:
    return [chunk(rows[start : start + size]) for start in range(0, len(rows), size)]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_vectors_gradients_are_those_of_a_padded_batch(family: str, attention: str, tmp_path: Path) -> None:
    decoder = trainable(tmp_path / "base", family, attention=attention)
    stage = ContrastiveEncoder(decoder).train()
    rows = random_rows(LENGTHS)
    directions = torch.randn(len(rows), decoder.config.hidden_size, generator=torch.Generator().manual_seed(2))
    (stage([chunk(rows)]) * directions).sum().backward()
    ours = gradients(stage)
    hidden, mask = padded(decoder, [row.token_ids for row in rows])
    for number, row in enumerate(rows):
        mask[number, : row.span_start] = 0
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    (pooled * directions).sum().backward()
    for name, gradient in gradients(stage).items():
        assert_close(ours[name], gradient)


def test_the_direction_of_attention_counts(tmp_path: Path) -> None:
    """A control of the gradients above."""
    rows = random_rows(LENGTHS)
    both, causal = (
        ContrastiveEncoder(trainable(tmp_path / "base", "llama", attention=attention))([chunk(rows)])
        for attention in ("bidirectional", "causal")
    )
    assert (both - causal).abs().max() > 1e-2


class KeepingEncoder(ContrastiveEncoder):
    """Computes each chunk once, and keeps all of it."""

    def forward(self, chunks: list[dict[str, Any]]) -> Tensor:
        return torch.cat([self._vectors(*each.values()) for each in chunks])


OBJECTIVE = Objective(
    20.0,
    absolute_margin=-0.1,
    widths=((64, 1.0), (16, 0.5)),
    distillation="DistillKLDivLoss",
    student_temperature=0.1,
)


def text_batch(vectors: Tensor) -> TextBatch:
    """A third of the texts are queries, and have two passages each; what a teacher says of them is arbitrary."""
    queries = len(vectors) // 3
    owners, positive = torch.arange(queries).repeat_interleave(2), torch.tensor([True, False]).repeat(queries)
    return TextBatch(
        vectors[:queries], vectors[queries : 3 * queries], owners, positive, torch.arange(2.0 * queries) % 3
    )


def loss_and_gradients(
    stage: ContrastiveEncoder, given: list[dict[str, Any]], seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """One contrastive step's, with every kind of loss."""
    torch.manual_seed(seed)
    vectors = stage(given)
    loss = contrastive_loss(text_batch(vectors), OBJECTIVE)
    loss.backward()
    return loss.detach(), gradients(stage)


def test_gradient_caching_is_the_whole_batch(tmp_path: Path) -> None:
    """Without dropout, in chunks of any size; with it, in chunks that keep what is cached otherwise."""
    rows = random_rows([12, 30, 7, 16, 21, 9] * 2)
    stage = ContrastiveEncoder(trainable(tmp_path / "base", "llama")).train()
    loss, whole = loss_and_gradients(stage, [chunk(rows)])
    for size in (1, 5, 6, 11):
        cached_loss, cached = loss_and_gradients(stage, chunks(rows, size))
        assert_close(cached_loss, loss)
        for name, gradient in cached.items():
            assert_close(gradient, whole[name])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_caching_replays_its_dropout(gradient_checkpointing: bool, tmp_path: Path) -> None:
    """The same random numbers, with everything kept: equal to the last bit. With others it is not: the control."""
    rows = random_rows([12, 30, 7, 16, 21, 9] * 2)
    options: dict[str, Any] = {"attention_dropout": 0.3, "lora_dropout": 0.1}
    kept = KeepingEncoder(trainable(tmp_path / "base", "llama", **options)).train()
    cached = ContrastiveEncoder(
        trainable(tmp_path / "base", "llama", gradient_checkpointing=gradient_checkpointing, **options)
    ).train()
    given = chunks(rows, 5)
    loss, whole = loss_and_gradients(kept, given)
    same_loss, same = loss_and_gradients(cached, given)
    other_loss, other = loss_and_gradients(cached, given, seed=1)
    assert torch.equal(loss, same_loss)
    assert loss != other_loss
    assert whole.keys() == same.keys()
    for name, gradient in whole.items():
        assert torch.equal(gradient, same[name])
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_gradient_caching_keeps_a_chunk_s_inputs_alone(tmp_path: Path) -> None:
    """Bytes that the forward pass leaves for the backward pass."""

    def kept(stage: ContrastiveEncoder, given: list[dict[str, Any]]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage(given)
        return sum(sizes.values())

    stage = ContrastiveEncoder(trainable(tmp_path / "base", "llama")).train()
    rows = random_rows([30] * 32)
    assert kept(stage, chunks(rows, 4)) < kept(stage, [chunk(rows)]) / 50


def test_gradient_checkpointing_is_the_same_step(tmp_path: Path) -> None:
    rows = random_rows([12, 30, 7, 16, 9, 20])
    options: dict[str, Any] = {"attention_dropout": 0.3}
    plain = ContrastiveEncoder(trainable(tmp_path / "base", "gemma3_text", **options)).train()
    lean = ContrastiveEncoder(
        trainable(tmp_path / "base", "gemma3_text", gradient_checkpointing=True, **options)
    ).train()
    (loss, expected), (same, found) = loss_and_gradients(plain, [chunk(rows)]), loss_and_gradients(lean, [chunk(rows)])
    assert torch.equal(loss, same)
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


def test_dropout_is_of_attention_and_only_while_training(tmp_path: Path) -> None:
    stage = ContrastiveEncoder(trainable(tmp_path / "base", "llama", attention_dropout=0.3)).train()
    given = [chunk(random_rows([12, 30]))]
    with torch.no_grad():
        assert not torch.equal(stage(given), stage(given))
        stage.eval()
        assert torch.equal(stage(given), stage(given))
