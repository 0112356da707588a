"""What is measured: encoders of random weights in real models' shapes, and rows of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModel

from bench.texts import sentences
from model_store.encoder.attention import choose_kernel, implementation_name
from model_store.encoder.encoder import Encoder
from model_store.encoder.quantization import Quantization
from model_store.rope import readable_positions
from model_store.shape import known_configs
from model_store.text.tokenizer import TokenizedText

if TYPE_CHECKING:
    from model_store.manifest import Manifest

Shape = tuple[str, dict[str, Any]]

_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "vocab_size": 12000,
    "max_position_embeddings": 8192,
    "initializer_range": 0.15,
}
_TINY_GEMMA = {"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}


def known(base: str, **others: Any) -> Shape:
    """That of a packaged recipe's base."""
    sizes = {**known_configs()[base], **others}
    sizes.pop("layer_types", None)  # transformers has the same, for any number of layers
    return sizes.pop("model_type"), sizes


SHAPES: dict[str, dict[str, Shape]] = {
    "real": {
        "8B": known("meta-llama/Meta-Llama-3-8B-Instruct"),
        "1.3B": known("princeton-nlp/Sheared-LLaMA-1.3B", max_position_embeddings=32768),
        "270M": known("demo:", query_pre_attn_scalar=256),
    },
    "tiny": {
        "8B": ("llama", _TINY),
        "1.3B": ("llama", {**_TINY, "num_key_value_heads": 2}),
        "270M": ("gemma3_text", {**_TINY, **_TINY_GEMMA}),
    },
}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A decoder of seeded weights, made on the device."""
    family, sizes = shape
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(CONFIG_MAPPING[family](**sizes), dtype=dtype, attn_implementation="eager")


def random_encoder(
    shape: Shape, device: torch.device, merged: bool = True, quantization: Quantization = "none"
) -> Encoder:
    """An encoder of a random model with the fastest kernel there is for it.

    It is what `Encoder.load` makes of a stored one, unless its projections are to stay as they are.
    """
    model = random_model(shape, device)
    config = model.config
    sizes = {"width": config.hidden_size, "max_positions": readable_positions(config.to_dict())}
    manifest: Any = SimpleNamespace(attention="bidirectional", pooling="mean", model_type=config.model_type, **sizes)
    if merged:
        return Encoder.of(model, manifest, device, quantization=quantization)
    kernel = choose_kernel("auto", device, torch.bfloat16, config)
    model.set_attn_implementation(implementation_name(kernel))
    return Encoder(model.eval().requires_grad_(False), manifest, device, torch.bfloat16, kernel)


def write_base(model: Any, folder: Path) -> str:
    """The path of a model as a base, with a tokenizer."""
    model.save_pretrained(folder, max_shard_size="200MB")
    trained_tokenizer().save(str(folder / "tokenizer.json"))
    return str(folder)


def store(model: Any, folder: Path) -> Manifest:
    """An encoder of the model, stored in a folder."""
    from model_store.build.build import build_encoder  # pydantic
    from model_store.recipe import recipe_from

    base = write_base(model, folder.parent / f"{folder.name}-base")
    return build_encoder(recipe_from(folder.name, base=base), folder)


def rows_of(lengths: Sequence[int]) -> list[TokenizedText]:
    """A row of random tokens of each length."""
    generator = np.random.default_rng(0)
    return [TokenizedText(generator.integers(3, 500, length).tolist(), 0) for length in lengths]


def trained_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with words as whole as a real one's, and BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<pad>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    bos = [("<bos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="$A $B", special_tokens=bos)
    return tokenizer
