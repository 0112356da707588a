"""The decoder-only families that can become encoders, one row each, and the names of their tensors.

A family belongs here when its attention goes through the transformers attention interface and carries
position only in RoPE; recurrent, hybrid and absolute-position models do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from model_store.errors import UserError

# What a token sees: its whole text, or the text up to itself.
Attention = Literal["bidirectional", "causal"]


class UnsupportedArchitectureError(UserError):
    """The base model's family has no row in `ARCHITECTURES`."""


@dataclass(frozen=True)
class Architecture:
    """`model_type` as config.json spells it; `eos_text` is what `eos_token` pooling appends to a text.

    `tokenizer_class` is the class that transformers uses for the family if tokenizer_config.json names none. `windowed`
    False drops a sliding window in config.json: LLM2Vec models of that family were trained by the official library,
    which attends to the whole text. `float16` False says that activations of the family's published models exceed
    65,504, the largest number of that dtype.
    """

    model_type: str
    eos_text: str
    tokenizer_class: str
    windowed: bool = True
    float16: bool = True


ARCHITECTURES = {
    row.model_type: row
    for row in (
        Architecture("llama", " </s>", "LlamaTokenizer"),
        Architecture("mistral", " </s>", "LlamaTokenizer", windowed=False),
        Architecture("ministral3", " </s>", "LlamaTokenizer"),
        Architecture("qwen2", "<|endoftext|>", "Qwen2Tokenizer", float16=False),
        Architecture("qwen3", "<|endoftext|>", "Qwen2Tokenizer", float16=False),
        Architecture("gemma", "<eos>", "GemmaTokenizer", float16=False),
        Architecture("gemma2", "<eos>", "GemmaTokenizer", float16=False),
        Architecture("gemma3_text", "<eos>", "GemmaTokenizer", float16=False),
        Architecture("phi3", "<|endoftext|>", "LlamaTokenizer"),
    )
}

# Multimodal wrappers whose decoder is in the table.
TEXT_MODEL_OF = {"gemma3": "gemma3_text"}

# Names of stock decoders that were published with code of their own, which made their attention bidirectional.
BIDIRECTIONAL_NAMES = {"llama_bidirec": "llama"}

# Names that training wrappers put into the names of a model's tensors: those of torch.compile, DistributedDataParallel,
# FSDP and activation checkpointing.
_TRAINING_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# The prefixes of models around the decoder that checkpoints were saved from, longest first. A bare decoder has none.
_WRAPPER_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")

# Parts of a checkpoint that an encoder does not have: the output head, RoPE tables that are recomputed,
# and the vision side of a multimodal wrapper.
_NOT_ENCODER = (
    "lm_head.",
    "score.",
    "vision_tower.",
    "multi_modal_projector.",
    "language_model.lm_head.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def architecture_of(model_type: str) -> Architecture:
    """The row for a config.json `model_type`.

    Raises:
        UnsupportedArchitectureError: naming the supported families.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} is not supported: an encoder can be made from {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def direct(config: Any, attention: Attention) -> None:
    """Change a transformers configuration so that its classes attend in one direction or in both.

    Raises:
        UnsupportedArchitectureError: if a model that is bidirectional by itself is asked to be causal.
    """
    if attention == "bidirectional" and not architecture_of(config.model_type).windowed:
        config.sliding_window = None
    if getattr(config, "use_bidirectional_attention", False) and config.model_type != "gemma3_text":
        del config.use_bidirectional_attention  # a flag that only code of a model's own knows, such as voyage-4-nano's
    elif getattr(config, "use_bidirectional_attention", False):
        if attention == "causal":
            raise UnsupportedArchitectureError("use_bidirectional_attention with causal attention is not reproduced")
        # transformers has halved the window by then, and leaves out its border: the other way to ask for bidirectional
        # attention, which is used here, has the border within.
        config.use_bidirectional_attention = False
        config.sliding_window -= 1
    config.is_causal = attention == "causal"


def is_encoder_tensor(name: str) -> bool:
    """False for checkpoint tensors that an encoder does not use, such as the output head."""
    name = unwrapped(name)
    return not name.startswith(_NOT_ENCODER) and not name.endswith("rotary_emb.inv_freq")


def unwrapped(name: str) -> str:
    """A tensor's (or module's) name without the parts that wrappers of training put into it."""
    return ".".join(part for part in name.split(".") if part not in _TRAINING_WRAPPERS)


def decoder_name(name: str) -> str:
    """A tensor's (or module's) name inside the bare decoder, whatever wrapper it was saved from."""
    name = unwrapped(name)
    for prefix in _WRAPPER_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
