"""The keys of a decoder's config.json: those that move its vectors, and those that move none.

A base that asks for anything else is refused when it is built, and the embedding-space id covers what moves vectors. So
both lists are this package's own: transformers adds, renames and drops keys from version to version. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Keys that move vectors → the value that means the same as a missing key.
MOVING: dict[str, Any] = {
    **dict.fromkeys(("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation")),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "rope_parameters")),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "layer_types", "sliding_window")),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bidirectional_attention"), False),
}

# The same for the keys within `rope_parameters`, and for those of a type of layer within it.
MOVING_ROPE: dict[str, Any] = {
    **dict.fromkeys(("rope_theta", "factor", "original_max_position_embeddings", "attention_factor")),
    **dict.fromkeys(("mscale", "mscale_all_dim", "short_factor", "long_factor", "llama_4_scaling_beta")),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor")),
    "rope_type": "default",
    "partial_rotary_factor": 1,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}

# Keys that transformers' classes turn into some of those above; and `is_causal`, for which a manifest has `attention`.
LAYOUT = (
    *("is_causal", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"),
    *("sliding_window_pattern", "use_sliding_window"),
)

# Keys that move no vector. Beside them are the keys that transformers has for all models, and those of text generation.
UNMOVING = frozenset(
    {
        # where the checkpoint comes from, and the code and kernels that it was run with
        *("name_or_path", "_name_or_path", "_model_name_or_path", "_commit_hash", "auto_map", "torch_dtype"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "experts_implementation"),
        *("_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "use_bfloat16", "transformers.js_config"),
        *("base_model_tp_plan", "base_model_pp_plan", "unsloth_fixed", "unsloth_version"),
        *("tf_legacy_loss", "output_past", "torchscript"),
        # training
        *("initializer_range", "gradient_checkpointing", "neftune_noise_alpha"),
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "classifier_dropout"),
        # tokens, limits and other heads; tensors say how large the vocabulary is
        *("vocab_size", "tokenizer_class", "model_max_length", "max_sequence_length", "seq_length"),
        *("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "padding_side", "prefix"),
        *("tie_word_embeddings", "tie_encoder_decoder", "final_logit_softcapping", "lm_head_bias", "is_decoder"),
        *("matryoshka_dimensions", "is_matryoshka", "num_labels", "finetuning_task", "task_specific_params"),
        # which layers have a window, before `use_sliding_window` or `layer_types` say that any has one
        "max_window_layers",
    }
)

# Keys that move no vector as long as they have one of these values.
UNMOVING_VALUES = {
    "pretraining_tp": (1,),
    # Phi-4: every layer attends, and RoPE is not interpolated
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    # llama_bidirec and its successors: a description or the default says the same
    "pooling": ("avg", "mean"),
}
UNMOVING_ROPE = ("type", "max_position_embeddings", "finetuned")


def vector_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a stored decoder's config.json that moves vectors, however transformers happens to write it.

    Defaults are left out or filled in, layers each have their window and RoPE, and the activation has one name.
    """
    by_layer = ("layer_types", "sliding_window", "rope_parameters", "hidden_act", "hidden_activation")
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    filled = {
        **config,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (width // heads if width and heads else None),
    }
    settings = {
        **_asked({key: value for key, value in filled.items() if key not in by_layer}, MOVING),
        "activation": config.get("hidden_activation") or config.get("hidden_act"),
        "layers": _layers(config),
    }
    # 10000 and 10000.0 are one setting.
    return dict(json.loads(json.dumps(settings), parse_int=float))


def _layers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The window and the RoPE of each layer. Without types of layers a window is that of all."""
    window, rope = config.get("sliding_window"), config.get("rope_parameters") or {}
    kinds = config.get("layer_types") or ["sliding_attention"] * (config.get("num_hidden_layers") or 0)
    return [
        {
            "window": window if kind == "sliding_attention" else None,
            "rope": _asked(rope.get(kind, rope) or {}, MOVING_ROPE),
        }
        for kind in kinds
    ]


def _asked(values: Mapping[str, Any], moving: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in moving if values.get(key) not in (None, moving[key])}
