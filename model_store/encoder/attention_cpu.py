"""Attention over packed texts by torch's own operations: for CPUs, and where no flash kernel serves.

`attend` takes the whole batch as one row, and computes each text apart from the others: long texts one at a time,
short ones together. A text's result has the same bits in every batch. Knows tensors alone; nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model_store.encoder.packing import to_device

# T packed tokens, S tokens of one text, H query heads, G key/value heads, d head width

# Where scores are held in memory, the queries of one text are taken in blocks of this many: they stay in the cache.
_QUERY_BLOCK = 128

# Texts of up to _SHORT tokens are computed together, padded to a multiple of _SHORT_STEP.
_SHORT = 64
_SHORT_STEP = 16


class Scores(NamedTuple):
    """What becomes of the products of queries and keys: times `scale`, then softcap·tanh(score / softcap) (Gemma 2).

    A token sees `left` tokens before itself and `right` after itself, None for all: (None, None) is bidirectional,
    (None, 0) causal.
    """

    scale: float
    left: int | None
    right: int | None
    softcap: float | None


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, how: Scores, dropout: float) -> Tensor:
    """(1, T, H, d) of query (1, H, T, d), key and value (1, G, T, d); with gradients if they are asked for."""
    if dropout or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _attend_differentiably(query[0], key[0], value[0], cu_seqlens, how, dropout)[None]
    attended: Tensor = _attend_each_text(query, key, value, cu_seqlens, *how)
    return attended


def attend_each_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> Tensor:
    """(1, T, H, d) for packed texts, without gradients. With `cu_seqlens` on the host it waits for no device."""
    how = Scores(scale, left, right, softcap)
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    # Where several heads share their keys, one matrix product serves all of these heads. On a CPU with 16-bit products
    # that is up to twice as fast as the fused kernel, which computes each head by itself.
    by_products = query.device.type == "cpu" and query.dtype != torch.float32 and query.shape[1] > key.shape[1]
    short: dict[int, list[tuple[int, int]]] = {}  # padded length → texts
    for start, end in pairwise(cu_seqlens.tolist()):
        special = _narrow(end - start, left) or _narrow(end - start, right or None) or softcap is not None
        if end - start <= _SHORT and not special:
            short.setdefault(_padded(end - start), []).append((start, end))
            continue
        rows, keys, values = (part[:, :, start:end] for part in (query, key, value))
        if special or by_products:
            attended = _scored(rows[0], keys[0], values[0], how)
        else:
            causal = right == 0
            attended = F.scaled_dot_product_attention(
                rows, keys, values, is_causal=causal, scale=scale, enable_gqa=True
            )[0]
        out[0, start:end] = attended.transpose(0, 1)
    for length, texts in short.items():
        _attend_short(query[0], key[0], value[0], out[0], length, texts, how, by_products)
    return out


# torch.compile sees a single operation, so the loop over texts does not break the layer's graph.
_attend_each_text = torch.library.custom_op("llm2vec::attend_each_text", mutates_args=())(attend_each_text)


@_attend_each_text.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def _attend_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    length: int,
    texts: list[tuple[int, int]],
    how: Scores,
    by_products: bool,
) -> None:
    """Fill `out` (T, H, d) for n texts of at most `length` tokens, all of them at once, without a window.

    A batch can hold dozens of short texts, and a call for each text costs more than its arithmetic: above all on a
    shared core, where every parallel step waits for the thread that was interrupted. The padded length depends on the
    text's own length alone, so its products have the same shapes in every batch: see docs/fidelity.md.
    """
    heads, width = query.shape[0], query.shape[2]
    plan = _short_plan(tuple(texts), length, query.device)
    queries, keys, values = (
        part.index_select(1, plan["places"]).unflatten(1, (len(texts), length)).transpose(0, 1)
        for part in (query, key, value)
    )  # (n, H or G, length, d)
    seen = plan["there"].view(len(texts), 1, 1, length)  # (n, heads, queries, keys)
    if how.right == 0:
        seen = seen & ~_unseen(length, length, 0, None, 0, query.device)
    if by_products:
        scores, values = _products(queries, keys, values, how)
        scores.view(len(texts), heads, length, length).masked_fill_(~seen, float("-inf"))
        attended = torch.bmm(scores.softmax(-1), values).view(len(texts), heads, length, width)
    else:
        attended = F.scaled_dot_product_attention(queries, keys, values, seen, scale=how.scale, enable_gqa=True)
    out[plan["taken"]] = attended.transpose(1, 2).flatten(0, 1)[plan["filled"]]


def _narrow(tokens: int, reach: int | None) -> bool:
    """Whether some token of a text of `tokens` sees less than the whole text, if it sees `reach` in a direction."""
    return reach is not None and tokens > reach + 1


def _padded(tokens: int) -> int:
    return -(-tokens // _SHORT_STEP) * _SHORT_STEP


@lru_cache(maxsize=8)
def _short_plan(texts: tuple[tuple[int, int], ...], length: int, device: torch.device) -> dict[str, Tensor]:
    """How n texts are taken out of the row, padded to `length`, and put back; all layers of a forward pass share it.

    `places` (n·length,) are the tokens to take, and `there` (n·length,) is False for padding. `filled` are the real
    tokens' places among the padded ones, `taken` their places in the row. The host makes the plan, because `nonzero`
    would wait for the device.
    """
    bounds = torch.tensor(texts)
    at = bounds[:, :1] + torch.arange(length)  # (n, length)
    there = at < bounds[:, 1:]
    places = at.minimum(bounds[:, 1:] - 1)  # padding repeats the last token, and no token sees it
    filled = there.flatten().nonzero()[:, 0]
    plan = {"places": places.flatten(), "filled": filled, "taken": at[there], "there": there.flatten()}
    return to_device(plan, device)


def _products(queries: Tensor, keys: Tensor, values: Tensor, how: Scores) -> tuple[Tensor, Tensor]:
    """The scores (n·G, H/G · S, S) of n texts' queries (n, H, S, d) and keys (n, G, S, d), and values (n·G, S, d)."""
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    return _scores(queries.reshape(len(keys), -1, keys.shape[-1]), keys, how), values


def _scores(queries: Tensor, keys: Tensor, how: Scores) -> Tensor:
    """(n, Q, S) of queries (n, Q, d) and keys (n, S, d), before any is left out."""
    scores = torch.baddbmm(queries.new_empty(1), queries, keys.transpose(1, 2), beta=0, alpha=how.scale)
    return scores if how.softcap is None else how.softcap * torch.tanh(scores / how.softcap)


def _scored(query: Tensor, key: Tensor, value: Tensor, how: Scores) -> Tensor:
    """(H, S, d) for one text, with the scores of one block of queries in memory at a time."""
    heads, length, width = query.shape
    groups = key.shape[0]
    by_group = query.view(groups, heads // groups, length, width)
    out = torch.empty_like(by_group, memory_format=torch.contiguous_format)
    before, after = (length if reach is None else reach for reach in (how.left, how.right))
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        first, last = max(start - before, 0), min(end + after, length)
        block = by_group[:, :, start:end].reshape(groups, -1, width)  # (G, H/G · queries, d)
        scores = _scores(block, key[:, first:last], how)
        if _narrow(length, how.left) or _narrow(length, how.right):
            unseen = _unseen(end - start, last - first, start - first, how.left, how.right, query.device)
            scores.view(groups, -1, end - start, last - first).masked_fill_(unseen, float("-inf"))
        attended = torch.bmm(scores.softmax(-1), value[:, first:last])
        out[:, :, start:end] = attended.view(groups, -1, end - start, width)
    return out.view(heads, length, width)


@lru_cache(maxsize=8)
def _unseen(queries: int, keys: int, offset: int, left: int | None, right: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: True for a key that the query must not see; query 0 stands at key `offset`."""
    at = torch.arange(queries, device=device)[:, None] + offset
    ahead = torch.arange(keys, device=device) - at
    return (ahead < -(keys if left is None else left)) | (ahead > (keys if right is None else right))


def _attend_differentiably(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, how: Scores, dropout: float
) -> Tensor:
    """(T, H, d) of (H, T, d), with gradients and dropout: texts of about one length together, with scores in memory."""
    heads, tokens, width = query.shape
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(cu_seqlens.tolist()):
        by_length.setdefault(_padded(end - start), []).append((start, end))
    parts, places = [], []
    for length, texts in by_length.items():
        bounds = torch.tensor(texts, device=query.device)
        at = bounds[:, :1] + torch.arange(length, device=query.device)  # (n, length)
        there = at < bounds[:, 1:]
        filled, taken = there.flatten().nonzero()[:, 0], at[there]
        queries, keys, values = (
            _spread_rows(part.transpose(0, 1), taken, filled, at.numel()).view(*at.shape, -1, width).transpose(1, 2)
            for part in (query, key, value)
        )  # (n, H or G, length, d)
        scores, values = _products(queries, keys, values, how)
        unseen = ~there[:, None, :]  # (n, 1 or queries, keys)
        if _narrow(length, how.left) or _narrow(length, how.right):
            # Padding sees the whole text: a query that sees no key gives NaN, and makes every gradient NaN.
            far = _unseen(length, length, 0, how.left, how.right, query.device) & there[:, :, None]
            unseen = unseen | far
        scores = scores.view(len(texts), -1, unseen.shape[1], length).masked_fill(unseen[:, None], float("-inf"))
        weights = F.dropout(scores.softmax(-1), dropout).view(len(values), -1, length)
        attended = torch.bmm(weights, values).view(len(texts), heads, length, width)
        parts.append(_spread_rows(attended.transpose(1, 2).flatten(0, 1), filled, None, len(filled)))
        places.append(taken)
    return _spread_rows(torch.cat(parts), None, torch.cat(places), tokens)


class _Spread(torch.autograd.Function):
    """The rows `taken` of x, put at the rows `filled` of zeros (rows, …); None stands for all rows in order.

    The gradient is the same operation with `taken` and `filled` exchanged. torch's gradient of indexing is much slower,
    as it allows for repeated rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor | None, filled: Tensor | None, rows: int) -> Tensor:
        ctx.rows, ctx.taken, ctx.filled = len(x), taken, filled
        return _spread(x, taken, filled, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _spread(gradients[0], ctx.filled, ctx.taken, ctx.rows), None, None, None


_spread_rows: Callable[..., Tensor] = _Spread.apply


def _spread(x: Tensor, taken: Tensor | None, filled: Tensor | None, rows: int) -> Tensor:
    picked = x if taken is None else x[taken]
    if filled is None:
        return picked
    out = x.new_zeros(rows, *x.shape[1:])
    out[filled] = picked
    return out
