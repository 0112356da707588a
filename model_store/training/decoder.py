"""A base and earlier adapters → a decoder that attends as its encoder will, with new LoRA adapters to train.

The earlier adapters are merged, as in the official recipe: the adapters of a second stage are trained on the merged
weights of the first stage. Only the new adapters learn.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from model_store.architectures import Attention, direct
from model_store.build.adapters import load_adapter
from model_store.build.build import check_names, merged_tensor
from model_store.build.checkpoints import open_checkpoint
from model_store.build.sources import Source
from model_store.encoder.attention import choose_kernel, implementation_name
from model_store.errors import CheckpointError


@dataclass(frozen=True)
class TrainableDecoder:
    """`adapted` is peft's model around the decoder; `head` (V, D) is frozen, and None if it is tied to the embeddings.

    The adapter's weights, their gradients and their optimizer's state are float32, whatever the decoder's dtype is.

    `base_config` is the base's configuration before its attention was changed.
    """

    adapted: Any
    head: Tensor | None
    base_config: Any

    @property
    def config(self) -> Any:
        """The decoder's configuration, with the encoder's attention."""
        return self.adapted.base_model.model.config


def load_trainable(
    base: Source,
    before: Sequence[Source],
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    lora_dropout: float,
    attention_dropout: float,
    gradient_checkpointing: bool,
    with_head: bool,
    attention: Attention = "bidirectional",
) -> TrainableDecoder:
    """Load the base on the CPU in `dtype`, with `before` merged and a new adapter of `rank` on every linear layer.

    The adapter's B is zero and its A is random, so set the seed before. Dropout also uses torch's own generator.

    Raises:
        CheckpointError, AdapterError, UnsupportedArchitectureError: as `build_encoder` does.
    """
    checkpoint = open_checkpoint(base.folder)
    adapters = [load_adapter(source.folder, source.reference) for source in before]
    shapes = check_names(base.reference, checkpoint, adapters)
    config = copy.deepcopy(checkpoint.config)
    direct(config, attention)
    config.use_cache = False
    config.attention_dropout = attention_dropout  # other dropouts belong to pre-training and stay off
    tensors = {name: merged_tensor(checkpoint, adapters, name, shape, dtype) for name, shape in shapes.items()}
    head = None
    if with_head and not getattr(config, "tie_word_embeddings", False):
        head = checkpoint.output_head()
        if head is None:
            raise CheckpointError(
                f"{base.reference} holds no output head, which MNTP predicts tokens with: give the base itself, not a "
                "stored encoder of it"
            )
        head = head.to(dtype)
    decoder = _assemble(config, tensors, dtype)
    decoder.set_attn_implementation(implementation_name(choose_kernel("auto", device, dtype, config)))
    if gradient_checkpointing:
        # Before transformers 5.20 the method has the other name.
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=lora_dropout, target_modules=linear_names(decoder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers has deprecated
        # Steps of 16-bit weights are coarser than most updates, and sums of 16-bit gradients lose most of their digits.
        adapted = get_peft_model(decoder, lora, autocast_adapter_dtype=True)
    return TrainableDecoder(adapted, head, checkpoint.config)


def linear_names(decoder: Any) -> list[str]:
    """The names of the linear layers in a decoder layer, such as q_proj: only the last part of each name."""
    modules = decoder.layers[0].named_modules()
    return [name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)]


def _assemble(config: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The decoder of a configuration, made from tensors in memory."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.device("meta"):
        decoder_class = type(AutoModel.from_config(config))
    return decoder_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, attn_implementation="eager"
    )
