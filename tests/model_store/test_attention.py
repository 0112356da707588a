"""Packed attention against transformers' own padded forward, the slow twin, for every supported family."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model_store.architectures import ARCHITECTURES
from model_store.encoder.attention import (
    AttentionError,
    Kernel,
    Layout,
    choose_kernel,
    implementation_name,
    kernel_lacks,
    packed_attention,
    packed_sdpa,
    packed_torch_flash,
)
from model_store.encoder.packing import PackedBatch
from model_store.encoder.pooling import pool
from model_store.text.tokenizer import TokenizedText
from tests.cuda_stand_in import Gpus, install
from tests.tiny import FAMILIES, WINDOW, normalized, padded_vectors, random_rows, tiny_config, tiny_model

# One token alone, the window's length and one to either side of it, and several windows long.
LENGTHS = [1, 3, WINDOW, WINDOW + 1, WINDOW + 2, 70, 9]

# float32 sums in another order; 3e-7 was seen.
TOLERANCE = 1e-5


def made(family: str, causal: bool) -> Any:
    model = tiny_model(family)
    model.config.is_causal = causal
    return model


@torch.inference_mode()
def packed_vectors(model: Any, rows: list[TokenizedText]) -> Tensor:
    batch = PackedBatch.pack(rows, "mean")
    model.set_attn_implementation(implementation_name("sdpa"))
    hidden = model(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seqlens=batch.cu_seqlens,
        longest=batch.longest,
    ).last_hidden_state[0]
    model.set_attn_implementation("eager")
    return pool(hidden, batch)


def test_every_supported_family_is_tried() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str, causal: bool) -> None:
    model = made(family, causal)
    rows = random_rows(LENGTHS)
    difference = (normalized(packed_vectors(model, rows)) - normalized(padded_vectors(model, rows))).abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_same_alone_and_among_64_others(family: str, causal: bool) -> None:
    model = made(family, causal)
    text = random_rows([23], seed=5)
    others = random_rows([(7 * i) % 40 + 1 for i in range(64)], seed=6)
    alone = normalized(packed_vectors(model, text))[0]
    among = normalized(packed_vectors(model, [*others[:31], *text, *others[31:]]))[31]
    assert (alone - among).abs().max() < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_sees_the_last_unless_attention_is_causal(family: str, causal: bool) -> None:
    model = made(family, causal)
    row = random_rows([8])[0].token_ids
    first = [TokenizedText(row, 0), TokenizedText([*row[:-1], (row[-1] + 1) % 200 + 3], 0)]
    batch = [PackedBatch.pack([text], "bos_token") for text in first]
    model.set_attn_implementation(implementation_name("sdpa"))
    with torch.inference_mode():
        left, right = (
            model(
                input_ids=one.token_ids[None],
                position_ids=one.position_ids[None],
                use_cache=False,
                cu_seqlens=one.cu_seqlens,
                longest=one.longest,
            ).last_hidden_state[0, 0]
            for one in batch
        )
    moved = (left - right).abs().max()
    assert moved == 0 if causal else moved > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_long_text_with_a_window_is_attended_in_blocks(causal: bool) -> None:
    """Longer than a block of queries, so that blocks and their borders are used."""
    model = made("gemma3_text", causal)
    rows = [TokenizedText(row.token_ids, 0) for row in random_rows([500, 11])]
    model.config.max_position_embeddings = 2048
    long = [TokenizedText(rows[0].token_ids * 3, 0), rows[1]]
    difference = (normalized(packed_vectors(model, long)) - normalized(padded_vectors(model, long))).abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_long_text_with_a_soft_cap_is_attended_in_blocks(causal: bool) -> None:
    model = made("gemma2", causal)
    long = [TokenizedText(random_rows([400])[0].token_ids * 3, 0)]
    difference = (normalized(packed_vectors(model, long)) - normalized(padded_vectors(model, long))).abs().max()
    assert difference < TOLERANCE


def test_what_attention_would_ignore_is_refused() -> None:
    attention = packed_attention(packed_sdpa)
    query = torch.zeros(1, 2, 4, 8)
    layout = {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "longest": 4}
    layer = SimpleNamespace(config=tiny_config("llama"))
    attention(layer, query, query, query, None, is_causal=False, **layout)
    with pytest.raises(AttentionError, match="s_aux"):
        attention(layer, query, query, query, None, s_aux=torch.zeros(2), **layout)
    with pytest.raises(AttentionError, match="mask"):
        attention(layer, query, query, query, torch.zeros(1, 1, 4, 4), **layout)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 16])
def test_torch_s_flash_kernel_takes_the_call(window: int | None, causal: bool) -> None:
    """Without a GPU: on the meta device torch checks arguments and shapes, and computes nothing."""
    heads, groups, tokens, width = 8, 2, 40, 64
    query = torch.empty(1, tokens, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    key = torch.empty(1, tokens, groups, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out = packed_torch_flash(query, key, key, Layout(cu_seqlens, 17, 0.1, window, causal=causal))
    assert out.shape == (1, tokens, heads, width)
    with pytest.raises(AttentionError, match="soft-capping"):
        packed_torch_flash(query, key, key, Layout(cu_seqlens, 17, 0.1, window, 5.0))


def test_a_kernel_that_can_not_serve_is_refused_with_the_way_out() -> None:
    cpu, config = torch.device("cpu"), tiny_config("llama")
    assert choose_kernel("auto", cpu, torch.bfloat16, config) == "sdpa"
    for kernel in ("torch-flash", "flash-attn"):
        with pytest.raises(AttentionError, match="not a CPU: set LLM2VEC_ATTENTION=auto"):
            choose_kernel(kernel, cpu, torch.bfloat16, config)


def test_which_kernels_can_serve() -> None:
    """A sliding window and a head width that is no multiple of 8 are no matter: the calls are tested here as well."""
    capabilities = (None, (7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    dtypes, widths = (torch.bfloat16, torch.float16, torch.float32), (20, 64, 128, 256, 264, 320)
    both = (False, True)
    for capability, dtype, width, softcap, package in itertools.product(capabilities, dtypes, widths, both, both):
        demand = (capability, dtype, width, softcap, package)
        flash = capability is not None and capability >= (8, 0) and dtype != torch.float32 and width <= 256
        can: dict[Kernel, bool] = {"torch-flash": flash and not softcap, "flash-attn": flash and package, "sdpa": True}
        assert {kernel: not kernel_lacks(kernel, *demand) for kernel in can} == can, demand


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("width", [8, 20, 36])
def test_heads_of_any_width_go_through_the_flash_kernel(
    monkeypatch: pytest.MonkeyPatch, width: int, window: int | None, causal: bool
) -> None:
    install(Gpus(), monkeypatch.setattr)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 60, width, generator=generator).bfloat16() for heads in (4, 2, 2))
    for scale in (None, 0.3):
        layout = Layout(torch.tensor([0, 7, 40, 41, 60], dtype=torch.int32), 33, scale, window, causal=causal)
        expected = packed_sdpa(query.float(), key.float(), value.float(), layout)
        torch.testing.assert_close(packed_torch_flash(query, key, value, layout).float(), expected, rtol=0, atol=0.02)


def attend(
    dropout: float, seed: int, window: int | None = None, requires_grad: bool = True, causal: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 60, 8, generator=generator) for heads in (4, 2, 2))
    query.requires_grad_(requires_grad)
    starts = torch.tensor([0, 7, 40, 41, 60], dtype=torch.int32)
    layout = Layout(starts, 33, window=window, dropout=dropout, causal=causal)
    torch.manual_seed(seed)
    return packed_sdpa(query, key, value, layout).detach()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_for_training_is_that_for_serving(window: int | None, causal: bool) -> None:
    served = attend(0.0, 0, window, requires_grad=False, causal=causal)
    torch.testing.assert_close(attend(0.0, 0, window, causal=causal), served, rtol=1e-5, atol=1e-6)


def test_dropout_is_of_attention_weights_and_right_in_the_mean() -> None:
    """What is left of a weight is scaled up, so that the mean over many draws is the value without dropout."""
    without, draws = attend(0.0, 0), torch.stack([attend(0.3, seed) for seed in range(1, 801)])
    spread = draws.std(0) / 800**0.5
    assert ((draws.mean(0) - without).abs() < 5 * spread + 1e-6).all()
    # A text of one token has one weight: it is kept, at 1/0.7 of its size, or it is not.
    alone = draws[:, 0, 40] / without[0, 40]
    assert set(alone.flatten().mul(0.7).round().long().tolist()) == {0, 1}
    assert 0.65 < (alone > 0.5).float().mean() < 0.75


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 20, 130])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_products_of_16_bits_for_all_heads_of_a_group(window: int | None, softcap: float | None, causal: bool) -> None:
    """Short texts together, long ones in blocks of queries: as float32 has it, which goes through the fused kernel."""
    starts = torch.tensor([0, 1, 12, 70, 350, 640], dtype=torch.int32)
    layout = Layout(starts, 290, window=window, softcap=softcap, causal=causal)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 640, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    expected = packed_sdpa(query.float(), key.float(), value.float(), layout)
    torch.testing.assert_close(packed_sdpa(query, key, value, layout).float(), expected, rtol=0, atol=0.03)
