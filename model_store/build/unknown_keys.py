"""Refuses a base whose config.json asks for something that its model class does not do.

transformers takes any key of config.json as an attribute, without a word. So a feature that it does not know, or that
only code of the checkpoint's own reads, would be left out of the encoder, and the vectors would be wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from model_store.config_keys import LAYOUT, MOVING, MOVING_ROPE, UNMOVING, UNMOVING_ROPE, UNMOVING_VALUES
from model_store.errors import CheckpointError

# Keys that a class or this package reads although the class declares no such field.
_READ = ("model_type", "head_dim", "is_causal", "use_bidirectional_attention")

# Keys that say again what another one says → that one. Gemma had both names of its activation and of its window.
_AGAIN = {
    "hidden_act": "hidden_activation",
    "hidden_activation": "hidden_act",
    "sliding_window_size": "sliding_window",
}

# RoPE's keys that only some families read; the defaults of these hold them.
_ROPE_OF_SOME = ("partial_rotary_factor", "llama_4_scaling_beta")


def refuse_unknown(path: Path, raw: Mapping[str, Any], config: Any, ignored: Collection[str]) -> None:
    """Refuse the keys of a decoder's part of config.json that are not reproduced, but for the `ignored`.

    `config` is what transformers makes of `raw`.

    Raises:
        CheckpointError: naming a key and its value; or a key that is to be ignored although nothing is wrong with it.
    """
    refused = _unknown(raw, config)
    for key, value in refused.items():
        if key not in ignored:
            raise CheckpointError(
                f"{path} asks for {key} {value!r:.80}, which is not reproduced: if it moves no vector of this model, "
                "build it by a recipe that lists the key under ignored_config_keys"
            )
    if others := sorted(set(ignored) - refused.keys()):
        raise CheckpointError(
            f"the recipe's ignored_config_keys name {', '.join(others)}, which {path} does not have, or which is "
            "reproduced: leave that out"
        )


def without(raw: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """The same keys but for the `ignored`, at any depth."""
    return {
        key: without(value, ignored) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in ignored
    }


def _unknown(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    usual = type(config)()
    of_all_models = vars(PreTrainedConfig()).keys() | vars(GenerationConfig()).keys()
    refused = {
        key: value
        for key, value in raw.items()
        if not (_asks_nothing(value) or key in of_all_models or _moves_nothing(key, value, raw, config, usual))
        and not ((key in MOVING or key in LAYOUT) and _is_read(key, config, usual))
    }
    rope = config.rope_parameters or {}
    by_layer = [value for value in rope.values() if isinstance(value, Mapping)]
    for parameters in by_layer or [rope]:
        refused |= {
            key: value
            for key, value in parameters.items()
            if not (_asks_nothing(value) or key in UNMOVING_ROPE or _rope_reads(key, value, parameters, usual))
        }
    return refused


def _asks_nothing(value: Any) -> bool:
    """A key that is off or empty asks for no more than a missing one. 0 is a number as any other."""
    return value is None or value is False or value in ("", [], {})


def _moves_nothing(key: str, value: Any, raw: Mapping[str, Any], config: Any, usual: Any) -> bool:
    if key in UNMOVING_VALUES:
        return value in UNMOVING_VALUES[key]
    if key in UNMOVING:
        return True
    if key == "layer_types":
        return set(value) == {"full_attention"}
    if key == "_sliding_window_pattern" and raw.get("layer_types"):
        return True  # those were made from it
    if key in _AGAIN and value == getattr(config, _AGAIN[key], None):
        return True
    # A field of a later transformers that nobody here knows, at the value that its class has anyway.
    return bool(key in vars(usual) and value == vars(usual)[key])


def _is_read(key: str, config: Any, usual: Any) -> bool:
    """Whether the class has such a field, or took the key to make others of it."""
    fields = vars(usual).keys() | usual.rope_parameters.keys()
    return key in _READ or bool({key, f"_{key}"} & fields) or key not in vars(config)


def _rope_reads(key: str, value: Any, parameters: Mapping[str, Any], usual: Any) -> bool:
    if key in _ROPE_OF_SOME and value != MOVING_ROPE[key]:
        return key in usual.rope_parameters or parameters.get("rope_type") == "proportional"
    return key in MOVING_ROPE
