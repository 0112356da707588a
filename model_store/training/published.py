"""Saves adapters in the layout of LLM2Vec's published ones, which the official library and `build` both read.

The first adapter of a chain comes with the base's config.json, which names the base and so chooses the template. All
adapters have llm2vec_config.json and the tokenizer, and in a file that only `build` reads the attention and the widths.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_store.build.adapters import AdapterError
from model_store.build.build import base_name
from model_store.build.checkpoints import read_raw_config
from model_store.build.description import TRAINED_FILE
from model_store.build.sources import Source
from model_store.training.form import Form

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Published:
    """The data of an adapter beside its weights; `config` is the base's configuration in transformers."""

    base: Source
    before: tuple[Source, ...]
    config: Any
    form: Form

    def save(self, adapted: Any, folder: Path) -> None:
        """Write the present adapter of peft's model and its other files, except the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in _lora_tensors(adapted).items()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / _WEIGHTS).chmod(0o644)
        _write(folder / _CONFIG, self._adapter_config(adapted))
        # No max_length: the encoder may read longer texts than those of its training.
        form = self.form
        pooled = {"pooling_mode": form.pooling, "skip_instruction": form.skip_instruction}
        _write(folder / "llm2vec_config.json", pooled)
        # The official library refuses an llm2vec_config.json with further keys.
        _write(folder / TRAINED_FILE, {"attention": form.attention, "widths": form.widths})
        if not self.before:
            _write(folder / "config.json", self._base_config())

    def _adapter_config(self, adapted: Any) -> dict[str, Any]:
        """The keys of peft 0.10, which made LLM2Vec's adapters: that version refuses the keys of later ones."""
        lora = adapted.peft_config["default"]
        return {
            "alpha_pattern": {},
            "auto_mapping": None,
            "base_model_name_or_path": self.base.reference.partition("@")[0],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "loftq_config": {},
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": lora.lora_dropout,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": lora.r,
            "rank_pattern": {},
            "revision": self.base.commit,
            "target_modules": sorted(lora.target_modules),
            "task_type": None,
            "use_dora": False,
            "use_rslora": False,
        }

    def _base_config(self) -> dict[str, Any]:
        """The base's own config.json, with the base's name. A GGUF file has none, so it is transformers'."""
        raw = read_raw_config(self.base.folder) or self.config.to_dict()
        raw.pop("auto_map", None)
        rope = raw.get("rope_parameters") or {}
        if "rope_theta" in rope:  # transformers before version 5 looks for it there
            raw.setdefault("rope_theta", rope["rope_theta"])
        return {**raw, "_name_or_path": base_name(self.base, self.before)}


def load_weights(adapted: Any, folder: Path) -> None:
    """Put a saved adapter's weights into peft's model of the same shape.

    Raises:
        AdapterError: if the weights do not have that shape.
    """
    tensors = load_file(folder / _WEIGHTS)
    if tensors.keys() != _lora_tensors(adapted).keys():
        raise AdapterError(f"{folder / _WEIGHTS} is another model's adapter")
    set_peft_model_state_dict(adapted, tensors)


def _lora_tensors(adapted: Any) -> dict[str, Tensor]:
    # With the default for embeddings, peft would look for the base on the hub.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return tensors


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
