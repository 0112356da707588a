"""Seeded models of a few thousand parameters, in the families and file layouts that real ones come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TokenizedText

if TYPE_CHECKING:
    from model_store.manifest import Manifest

WINDOW = 16
VOCABULARY = 320

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Every supported family, with a short sliding window where it can have one, soft-capping where it has that, and a
# scale that is not 1/sqrt(head width) where the family sets its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 20},
    "phi3": {"sliding_window": WINDOW},
    # Queries at later positions are scaled up.
    "ministral3": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.1,
        },
    },
}

_CORPUS = (
    "A plane is taking off. An air plane is taking off. A man is playing a flute.",
    "Given a web search query, retrieve relevant passages that answer the query: how much protein a day",
    "The river ran past the mill, and the mill ground the corn of the valley.",
)


def tiny_config(family: str) -> Any:
    """A configuration with random-looking weights to come: see `tiny_model`."""
    return CONFIG_MAPPING[family](**_COMMON, **FAMILIES[family])


def tiny_model(family: str, head: bool = False, seed: int = 0) -> Any:
    """A seeded model, bare or with its causal-LM head; weights large enough that attention patterns matter."""
    torch.manual_seed(seed)
    model = (AutoModelForCausalLM if head else AutoModel).from_config(tiny_config(family), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def product_weights(model: Any) -> int:
    """Weights of the matrix products in a decoder's layers, whatever modules hold them."""
    modules = (module for layer in model.layers for module in layer.modules())
    return sum(int(module.in_features * module.out_features) for module in modules if hasattr(module, "in_features"))


def tiny_tokenizer(bos: bool = True) -> Tokenizer:
    """A byte-level BPE tokenizer of about 300 tokens, with BOS before each text or without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
        )
    return tokenizer


def save_base(
    folder: Path, family: str = "llama", layout: str = "safetensors", head: bool = True, seed: int = 0, bos: bool = True
) -> Any:
    """A base as it would come from a hub, in `folder`; returns the model. layout: safetensors, sharded or bin."""
    model = tiny_model(family, head, seed)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tiny_tokenizer(bos).save(str(folder / "tokenizer.json"))
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif layout == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def save_adapter(folder: Path, model: Any, seed: int, **options: Any) -> Any:
    """Train nothing, but save a LoRA adapter of random A and B for `model`; returns the peft model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
    adapted = get_peft_model(model, LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    # Asked about embeddings, peft would look for the base on the hub.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def build_tiny(folder: Path, family: str = "llama", bos: bool = True, **recipe: Any) -> Manifest:
    """A stored float32 encoder of a tiny base, in `folder`."""
    from model_store.build.build import build_encoder  # pydantic, which models in memory do without
    from model_store.recipe import recipe_from

    base = folder.parent / f"{folder.name}-base"
    save_base(base, family, bos=bos)
    return build_encoder(recipe_from(folder.name, base=str(base), dtype="float32", **recipe), folder)


def random_rows(lengths: list[int], seed: int = 0) -> list[TokenizedText]:
    """Rows of random tokens; all but the first token is pooled, where there is more than one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenizedText(torch.randint(3, VOCABULARY - 20, (length,), generator=generator).tolist(), min(1, length - 1))
        for length in lengths
    ]


@torch.inference_mode()
def padded_vectors(model: Any, rows: list[TokenizedText]) -> Tensor:
    """The slow twin: (B, D) float32 mean-pooled vectors from transformers' own padded forward.

    It is bidirectional unless the model's configuration says that it is causal.
    """
    batch = PackedBatch.pack(rows, "mean")
    lengths = [len(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    token_ids = pad(list(batch.token_ids.split(lengths)), batch_first=True)
    weights = pad(list(batch.pooling_weights.split(lengths)), batch_first=True)
    mask = pad([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True)
    causal = getattr(model.config, "is_causal", False)
    output = model(input_ids=token_ids, attention_mask=mask, is_causal=causal, use_cache=False)
    hidden = output.last_hidden_state.float()
    vectors: Tensor = (hidden * weights[..., None]).sum(1) / weights.sum(1)[:, None]
    return vectors


def normalized(vectors: Tensor) -> Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
