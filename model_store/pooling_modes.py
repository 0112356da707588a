"""How token vectors become one text vector, as weights for each token. No torch here."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

PoolingMode = Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"]


def token_weights(mode: PoolingMode, length: int, span_start: int) -> NDArray[np.float32]:
    """The weights, of shape (length,), of the tokens of one text; a text's vector is Σ w·h / Σ w.

    The pooled span is the tokens from `span_start` to the end. `weighted_mean` weighs them 1..n (SGPT, Muennighoff
    2022); `last_token` and `eos_token` take the text's last token, `bos_token` its first.
    """
    weights = np.zeros(length, dtype=np.float32)
    match mode:
        case "mean":
            weights[span_start:] = 1.0
        case "weighted_mean":
            weights[span_start:] = np.arange(1, length - span_start + 1, dtype=np.float32)
        case "last_token" | "eos_token":
            weights[-1] = 1.0
        case "bos_token":
            weights[0] = 1.0
    return weights
