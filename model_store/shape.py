"""A decoder's size by its config.json: the memory of its weights and of a batch, and the operations for a token.

Only arithmetic: no torch and no weights. Norms and biases, less than a thousandth of a model, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model_store.architectures import TEXT_MODEL_OF, architecture_of
from model_store.rope import readable_positions
from model_store.tables import packaged_tables

# Bytes of a weight, by the arithmetic that it is multiplied in.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}

Arithmetic = Literal["float32", "bfloat16", "fp8"]


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `windows` holds each layer's sliding window, or None if a layer attends to the whole text."""

    width: int
    heads: int
    key_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    max_positions: int
    windows: tuple[int | None, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Shape:
        """The shape in a config.json, with defaults filled in. For a multimodal wrapper it is the text model's shape.

        Raises:
            UnsupportedArchitectureError: for a family that can't become an encoder.
        """
        if config["model_type"] in TEXT_MODEL_OF:
            config = config["text_config"]
        window = config.get("sliding_window") if architecture_of(config["model_type"]).windowed else None
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        kinds = config.get("layer_types") or ["sliding_attention"] * layers
        return cls(
            width=config["hidden_size"],
            heads=heads,
            key_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            mlp_width=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            max_positions=readable_positions(config),
            windows=tuple(window if window and kind == "sliding_attention" else None for kind in kinds),
        )

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.windows)

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' matrix products: query and output, key and value, and an MLP with a gate."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.width * self.mlp_width)

    @property
    def parameters(self) -> int:
        """The linear parameters and the embedding table."""
        return self.linear_parameters + self.vocabulary * self.width

    @property
    def linear_flops_per_token(self) -> int:
        """2 for each weight of the layers' matrix products; the embedding table is only looked up."""
        return 2 * self.linear_parameters

    def attention_flops(self, lengths: Iterable[int]) -> int:
        """4·S·S·(heads · head width) for each text of S tokens and layer: scores and their product with the values.

        In layers with a sliding window a token meets at most 2·window + 1 others.
        """
        texts = list(lengths)
        pairs = sum(
            length * min(length, 2 * window + 1 if window else length) * self.windows.count(window)
            for window in set(self.windows)
            for length in texts
        )
        return 4 * self.heads * self.head_width * pairs

    def flops_per_token(self, text_tokens: int) -> float:
        """The operations of all products for each token, in texts of this length."""
        return self.linear_flops_per_token + self.attention_flops([text_tokens]) / text_tokens

    def weight_bytes(self, arithmetic: Arithmetic = "bfloat16") -> int:
        """Bytes of the weights on a device. In fp8 the embedding table stays in bfloat16."""
        table = self.vocabulary * self.width * max(WEIGHT_BYTES[arithmetic], 2)
        return self.linear_parameters * WEIGHT_BYTES[arithmetic] + table

    def activation_bytes(self, tokens: int, arithmetic: Arithmetic = "bfloat16") -> int:
        """The most bytes that a batch of this many tokens needs beside the weights: at its widest point, within an MLP.

        There it holds gate, up and their product, the residual stream, the normalised input, and the tensors that make
        it.
        """
        return tokens * max(WEIGHT_BYTES[arithmetic], 2) * (3 * self.mlp_width + 6 * self.width)


def known_configs() -> dict[str, dict[str, Any]]:
    """The config.json of the packaged recipes' bases, by their references."""
    configs = packaged_tables("shapes.toml")
    for config in configs.values():
        if every := config.pop("sliding_window_pattern", None):  # one layer of so many attends to the whole text
            kinds = [*["sliding_attention"] * (every - 1), "full_attention"]
            config["layer_types"] = [kinds[layer % every] for layer in range(config["num_hidden_layers"])]
    return configs
