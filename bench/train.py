"""Training, packed and padded, tokens a second: whole steps forward and backward, one and the other in turn.

Padded is what the official scripts do: every text of a batch as long as the longest, through transformers' own
attention with a mask. Both have the same texts, base, adapters and loss; a step's tokens are those of the texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.report import finish, options_of, seconds_of, tell
from bench.texts import mixed_texts, sentences, tokenized
from model_store.build.sources import Source
from model_store.encoder.devices import choose_device, choose_dtype
from model_store.encoder.packing import PackedBatch, to_device
from model_store.text.tokenizer import TokenizedText
from model_store.training.decoder import TrainableDecoder, load_trainable
from model_store.training.losses import in_batch_loss
from model_store.training.stages import ContrastiveEncoder

DEMO = Path("~/.cache/llm2vec-service/demo").expanduser()


def main() -> None:
    """Print a table, and one line of JSON."""
    parser = options_of(__doc__)
    parser.add_argument("--base", type=Path, default=DEMO, help="a stored encoder (default %(default)s)")
    parser.add_argument("--texts", type=int, default=8, help="texts of a step, each taken twice (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each (default %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.3)
    options = parser.parse_args()
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
    result: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "loads": {}}
    for load, texts in (("sentences", sentences()), ("mixed", mixed_texts(options.texts * options.steps))):
        result["loads"][load] = _measure(options, decoder, device, texts)
        tell(load, result["loads"][load])
    finish("train", result, options.save)


def _measure(options: argparse.Namespace, decoder: TrainableDecoder, device: torch.device, texts: list[str]) -> Any:
    rows = [row.shortened(512) for row in tokenized(texts, options.base)]
    batches = [rows[n * options.texts : (n + 1) * options.texts] * 2 for n in range(options.steps)]
    stage = ContrastiveEncoder(decoder)
    ways = {"packed": partial(_packed, stage), "padded": partial(_padded, decoder)}

    def step(vectors: Callable[..., Tensor], batch: list[TokenizedText]) -> None:
        in_batch_loss(vectors(batch, device).split(len(batch) // 2), 20.0).backward()
        stage.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    tokens = [sum(map(len, batch)) for batch in batches]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for batch in (batches[0], *batches):  # the first is a warm-up
        for name, way in ways.items():
            rates[name].append(sum(map(len, batch)) / seconds_of(partial(step, way, batch)))
    speed = {name: round(median(each[1:])) for name, each in rates.items()}
    padding = sum(max(map(len, batch)) * len(batch) for batch in batches) / sum(tokens) - 1
    return {
        "tokens_per_step": round(median(tokens)),
        "padding_percent": round(100 * padding),
        "packed_tokens_per_second": speed["packed"],
        "padded_tokens_per_second": speed["padded"],
        "speedup": round(speed["packed"] / speed["padded"], 2),
    }


def _packed(stage: ContrastiveEncoder, rows: list[TokenizedText], device: torch.device) -> Tensor:
    batch = PackedBatch.pack(rows, "mean")
    return stage([vars(batch) | to_device(batch.tensors, device)])  # type: ignore[no-any-return]


def _padded(decoder: TrainableDecoder, rows: list[TokenizedText], device: torch.device) -> Tensor:
    """Through transformers' sdpa, with a mask."""
    model = decoder.adapted.base_model.model
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row.token_ids) for row in rows], batch_first=True).to(device)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True).to(device)
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    hidden = model(input_ids=ids, attention_mask=mask, is_causal=False, use_cache=False).last_hidden_state.float()
    model.set_attn_implementation(packed)
    for number, row in enumerate(rows):
        mask[number, : row.span_start] = 0
    vectors: Tensor = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return vectors


if __name__ == "__main__":
    main()
