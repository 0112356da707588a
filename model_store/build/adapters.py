"""LoRA adapters (Hu et al. 2021) merged into weights: W + (alpha/r)·B·A in float32, each adapter in order.

A tensor of an adapter that finds no place is an error: peft itself only warns and leaves it out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from model_store.architectures import decoder_name, unwrapped
from model_store.build.checkpoints import load_tensors
from model_store.errors import UserError
from model_store.json_text import read_json_object

_LORA_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")

# Options that merging follows, or that say nothing of the trained weights. Every other one must have peft's default.
_FOLLOWED = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "lora_dropout"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "qalora_group_size"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),  # of initialisations
    }
)

# Initialisations that leave the base's own weights as they are when training starts, so that B·A is the whole change.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterError(UserError):
    """An adapter that can't be read, or does not fit the base."""


@dataclass(frozen=True)
class LowRankUpdate:
    """An adapter's update of one weight: `a` (r, in), `b` (out, r), and the factor alpha/r (or alpha/√r)."""

    a: Tensor
    b: Tensor
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """W + (alpha/r)·B·A, computed in place; `weight` must be float32, so that its caller rounds only once."""
        return weight.addmm_(self.b.float(), self.a.float(), alpha=self.scale)

    def shape(self) -> tuple[int, int]:
        """(out, in): the shape of the weight that the update is added to."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: updates by weight name, such as `layers.0.self_attn.q_proj.weight`."""

    reference: str
    updates: dict[str, LowRankUpdate]


def load_adapter(folder: Path, reference: str) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors (or .bin, as tensors only).

    Raises:
        AdapterError, CheckpointError: if files are missing, unreadable, or hold anything but plain LoRA updates.
    """
    config = _read_config(folder, reference)
    tensors = _read_tensors(folder, reference)
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA_TENSOR.fullmatch(unwrapped(name))
        if match is None:
            raise AdapterError(f"adapter {reference}: {name} is not a plain LoRA tensor and can't be merged")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterError(f"adapter {reference} holds no tensors")
    updates = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(
                f"adapter {reference}: {module} has lora_{next(iter(pair))} only, A and B belong together"
            )
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"adapter {reference}: {module} has A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}, "
                "which have no common rank"
            )
        updates[f"{decoder_name(module)}.weight"] = LowRankUpdate(a, b, _scale(config, module, a.shape[0]))
    return Adapter(reference, updates)


def check_fit(adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse an adapter that does not belong to weights of these names and shapes.

    Raises:
        AdapterError: naming the first tensor without a place, or the two shapes that differ.
    """
    for name, update in adapter.updates.items():
        if name not in shapes:
            raise AdapterError(f"adapter {adapter.reference}: the base has no {name} to merge into")
        if update.shape() != shapes[name]:
            raise AdapterError(
                f"adapter {adapter.reference}: its update of {name} has shape {update.shape()}, "
                f"the base's weight {shapes[name]}: it was trained for another base"
            )


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    declared = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    if declared != rank:
        raise AdapterError(f"{module} has rank {rank}, adapter_config.json says {declared}")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / sqrt(rank)) if config.use_rslora else float(alpha / rank)


def _read_config(folder: Path, reference: str) -> LoraConfig:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"adapter {reference}: {folder} has no adapter_config.json")
    raw = read_json_object(path)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"adapter {reference} is of type {raw.get('peft_type')}: only LORA can be merged")
    unknown = sorted(key for key, value in raw.items() if value and key not in LoraConfig.__dataclass_fields__)
    if unknown:
        raise AdapterError(f"adapter {reference}: {path} has options this version of peft does not know: {unknown}")
    plain = LoraConfig()
    wrong = [key for key, value in raw.items() if key not in _FOLLOWED and value and value != getattr(plain, key, None)]
    if raw.get("init_lora_weights") not in _INITIALISATIONS:
        wrong.append("init_lora_weights")
    if wrong:
        asked = ", ".join(f"{key} {raw[key]!r}" for key in wrong)
        raise AdapterError(
            f"adapter {reference} uses {asked}, more than plain LoRA: merge it with peft first, and build from the "
            "result"
        )
    for key in ("lora_alpha", "rank_pattern", "alpha_pattern"):
        value = raw.pop(key, None)
        numbers = value.values() if isinstance(value, dict) and key != "lora_alpha" else [value]
        if value is not None:  # null asks for the default
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise AdapterError(f"adapter {reference}: {path} has the {key} {value!r}, which is no number")
            raw[key] = value
    known = {key: value for key, value in raw.items() if key in LoraConfig.__dataclass_fields__}
    return LoraConfig(**{**known, "task_type": None, "auto_mapping": None})


def _read_tensors(folder: Path, reference: str) -> dict[str, Tensor]:
    safe, torch_file = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not safe.is_file() and not torch_file.is_file():
        raise AdapterError(f"adapter {reference}: {folder} has no adapter_model.safetensors or adapter_model.bin")
    return load_tensors(safe, torch_file)
