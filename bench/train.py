"""Training, packed and padded, tokens a second: whole steps forward and backward, one and the other in turn.

    python -m bench.train [--base DIR] [--texts 8] [--steps 3] [--dropout 0.3] [--save]

Padded is what the official scripts do: every text of a batch as long as the longest, through transformers' own
attention with a mask. Both have the same texts, base, adapters and loss; a step takes each of its texts twice, and its
tokens are those of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.report import by_turns, finish, medians, options_of, seconds_of, tell
from bench.texts import mixed_texts, sentences, tokenized
from model_store.build.sources import Source
from model_store.encoder.devices import choose_device, choose_dtype
from model_store.encoder.packing import PackedBatch, to_device
from model_store.text.tokenizer import TokenizedText
from model_store.training.decoder import load_trainable
from model_store.training.losses import TextBatch, texts_loss
from model_store.training.objective import Objective
from model_store.training.stages import ContrastiveEncoder

Vectors = Callable[[list[TokenizedText]], Tensor]


def main() -> None:
    """Print the steps, and one line of JSON."""
    demo = Path("~/.cache/llm2vec-service/demo").expanduser()
    options = options_of(__doc__, base=demo, texts=8, steps=3, dropout=0.3)
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    decoder = load_trainable(
        Source(str(options.base), options.base),
        (),
        dtype,
        device,
        rank=16,
        lora_dropout=0.0,
        attention_dropout=options.dropout,
        gradient_checkpointing=False,
        with_head=False,
    )
    decoder.adapted.to(device).train()
    stage = ContrastiveEncoder(decoder)

    def packed(rows: list[TokenizedText]) -> Tensor:
        batch = PackedBatch.pack(rows, "mean")
        return stage([vars(batch) | to_device(batch.tensors, device)])  # type: ignore[no-any-return]

    def padded(rows: list[TokenizedText]) -> Tensor:
        return padded_vectors(decoder.adapted.base_model.model, rows, device)

    def step(vectors: Vectors, batch: list[TokenizedText]) -> None:
        queries, positives = vectors(batch).chunk(2)
        owners = torch.arange(len(queries), device=device)
        pairs = TextBatch(queries, positives, owners, torch.ones_like(owners, dtype=torch.bool))
        texts_loss(pairs, Objective(scale=20.0)).backward()
        stage.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def rate(vectors: Vectors, batches: Iterator[list[TokenizedText]]) -> float:
        batch = next(batches)
        return sum(map(len, batch)) / seconds_of(partial(step, vectors, batch))

    result: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "loads": {}}
    for load, texts in (("sentences", sentences()), ("mixed", mixed_texts(options.texts * options.steps))):
        rows = [row.shortened(512) for row in tokenized(texts, options.base)]
        batches = [rows[n * options.texts : (n + 1) * options.texts] * 2 for n in range(options.steps)]
        runs = {way.__name__: partial(rate, way, iter([batches[0], *batches])) for way in (packed, padded)}
        rates = by_turns(options.steps + 1, runs)
        speeds = medians({name: found[1:] for name, found in rates.items()})  # the first is a warm-up
        tokens = [sum(map(len, batch)) for batch in batches]
        padding = sum(max(map(len, batch)) * len(batch) for batch in batches) / sum(tokens) - 1
        result["loads"][load] = {
            "tokens_per_step": round(median(tokens)),
            "padding_percent": round(100 * padding),
            **{f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
            "speedup": round(speeds["packed"] / speeds["padded"], 2),
        }
        tell(load, result["loads"][load])
    finish("train", result, options.save)


def padded_vectors(model: Any, rows: list[TokenizedText], device: torch.device) -> Tensor:
    """(B, D) means of a batch that is padded to its longest row, by transformers' sdpa with a mask."""
    token_ids = pad_sequence([torch.tensor(row.token_ids) for row in rows], batch_first=True).to(device)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True).to(device)
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    output = model(input_ids=token_ids, attention_mask=mask, is_causal=False, use_cache=False)
    model.set_attn_implementation(packed)
    for place, row in enumerate(rows):
        mask[place, : row.span_start] = 0
    vectors: Tensor = (output.last_hidden_state.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return vectors


if __name__ == "__main__":
    main()
