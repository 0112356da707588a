"""Keys of config.json: a base's key that is not reproduced is refused, and what moves vectors makes the space's id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from model_store.build.build import build_encoder
from model_store.build.checkpoints import open_checkpoint
from model_store.build.verify import verify_encoder
from model_store.config_keys import LAYOUT, MOVING, MOVING_ROPE, UNMOVING, UNMOVING_VALUES, vector_settings
from model_store.errors import CheckpointError
from model_store.manifest import read_manifest
from model_store.recipe import read_recipe, recipe_from
from tests.tiny import FAMILIES, build_tiny, save_base

Change = Callable[[dict[str, Any]], dict[str, Any]]


def changed(folder: Path, change: Change) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def given(**values: Any) -> Change:
    return lambda config: {**config, **values}


def base(tmp_path: Path, family: str, change: Change) -> Path:
    save_base(tmp_path / "base", family)
    return changed(tmp_path / "base", change)


def old_layout(**values: Any) -> Change:
    """As transformers 4 wrote RoPE."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        del config["rope_parameters"]
        return {**config, "rope_theta": 5e5, **values}

    return change


def wrapped(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "mm_tokens_per_image": 256,
        "some_projector": "deep",
        "text_config": config,
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
    }


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}

# Keys of published checkpoints, beside those that a tiny base of the family has anyway.
PUBLISHED: dict[str, tuple[str, Change]] = {
    "Llama 2": ("llama", old_layout(_name_or_path="x", pretraining_tp=1, rope_scaling=None, torch_dtype="float16")),
    "Llama 3.1": ("llama", old_layout(rope_scaling=LLAMA3, eos_token_id=[1, 2], mlp_bias=False)),
    "Sheared LLaMA": ("llama", old_layout(pretraining_tp=1, max_sequence_length=4096)),
    "llama-nemotron": (
        "llama",
        given(model_type="llama_bidirec", pooling="avg", temperature=0.02, auto_map={"AutoModel": "x.Y"}),
    ),
    "GritLM": ("mistral", old_layout(auto_map={"AutoModel": "x.Y"}, id2label={"0": "LABEL_0"}, label2id={"L": 0})),
    "Nemotron 3": ("ministral3", given(is_causal=False, pooling="avg", dtype="bfloat16")),
    "gte-Qwen2": (
        "qwen2",
        old_layout(is_causal=False, sliding_window=131072, use_sliding_window=False, max_window_layers=28),
    ),
    "Qwen2.5": ("qwen2", old_layout(use_mrope=False, use_sliding_window=False, sliding_window=131072)),
    "Qwen3-Embedding": ("qwen3", old_layout(rope_scaling=None, use_sliding_window=False, max_window_layers=28)),
    "voyage-4-nano": ("qwen3", given(num_labels=2048, auto_map={"AutoModel": "x.Y"})),
    "Gemma": ("gemma", given(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")),
    "Gemma 2": (
        "gemma2",
        old_layout(hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid", sliding_window_size=16),
    ),
    "Gemma 3": (
        "gemma3_text",
        lambda config: old_layout(rope_local_base_freq=1e4, sliding_window_pattern=2, layer_types=None)(config),
    ),
    "Gemma 3, multimodal": ("gemma3_text", wrapped),
    "EmbeddingGemma": (
        "gemma3_text",
        old_layout(rope_local_base_freq=1e4, _sliding_window_pattern=2, use_bidirectional_attention=True),
    ),
    "Phi-3": ("phi3", old_layout(attention_bias=False, embd_pdrop=0.0, resid_pdrop=0.0)),
    "Phi-4": (
        "phi3",
        old_layout(
            partial_rotary_factor=0.75,
            rope_scaling=LONGROPE,
            full_attn_mod=1,
            interpolate_factor=1,
            lm_head_bias=False,
        ),
    ),
    "tuned with unsloth": ("llama", given(unsloth_fixed=True, unsloth_version="2025.1", _attn_implementation="sdpa")),
    "a later transformers' defaults": ("llama", given(per_layer_config=None, new_feature=False, chunks=[], note="")),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_keys_are_reproduced(tmp_path: Path, case: str) -> None:
    family, change = PUBLISHED[case]
    assert open_checkpoint(base(tmp_path, family, change)).config.model_type == family


REFUSED: dict[str, tuple[str, Change, str]] = {
    "a feature that no class knows": ("llama", given(use_cool_scaling=True), "use_cool_scaling True"),
    "a number, even 0": ("llama", given(residual_multiplier=0), "residual_multiplier 0"),
    "another family's soft cap": ("llama", given(attn_logit_softcapping=5.0), "attn_logit_softcapping 5.0"),
    "another family's window": ("llama", given(sliding_window=16), "sliding_window 16"),
    "another family's types of layers": (
        *("llama", given(layer_types=["sliding_attention"] * 3)),
        r"layer_types \['sliding_attention', ",
    ),
    "biases that the family has not": ("mistral", given(attention_bias=True), "attention_bias True"),
    "RoPE of images": ("qwen2", given(use_mrope=True), "use_mrope True"),
    "attention in chunks": (
        "qwen2",
        given(dual_chunk_attention_config={"a": 1}),
        "dual_chunk_attention_config {'a': 1}",
    ),
    "products in slices": ("llama", given(pretraining_tp=2), "pretraining_tp 2"),
    "sizes of their own for layers": ("llama", given(per_layer_config={"0": {"head_dim": 8}}), "per_layer_config {'0'"),
    "two activations": ("gemma", given(hidden_activation="relu"), "hidden_activation 'relu'"),
    "another window": ("gemma2", given(sliding_window_size=7), "sliding_window_size 7"),
    "another pooling": ("llama", given(pooling="last"), "pooling 'last'"),
    "layers without a window here": ("phi3", given(full_attn_mod=2), "full_attn_mod 2"),
    "RoPE of a part of each head": ("llama", old_layout(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "the same for layers of two types": ("gemma3_text", given(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "RoPE in sections": (
        *("qwen2", old_layout(rope_scaling={"rope_type": "default", "mrope_section": [8]})),
        r"mrope_section \[8\]",
    ),
    "scaled queries of another family": (
        *("mistral", old_layout(rope_scaling={"rope_type": "default", "llama_4_scaling_beta": 0.1})),
        "llama_4_scaling_beta 0.1",
    ),
    "RoPE of Phi's longest relatives": (
        "phi3",
        old_layout(rope_scaling={**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "long_mscale": 1.2}),
        "long_mscale",
    ),
    "in a wrapper's text model": ("gemma3_text", lambda config: wrapped({**config, "clip_qkv": 8}), "clip_qkv 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_reproduced_is_refused_with_its_key_and_value(tmp_path: Path, case: str) -> None:
    family, change, told = REFUSED[case]
    folder = base(tmp_path, family, change)
    with pytest.raises(CheckpointError, match=rf"{folder}/config.json asks for {told}.*not reproduced.*ignored_config"):
        open_checkpoint(folder)


# Of the recipe `base = "b"`, before there were keys to ignore.
FINGERPRINT = "d5e164c35105355bde94618ff3696108a4d6600d6b1b78cdf0d51b4133973b94"


def test_a_recipe_can_ignore_keys(tmp_path: Path) -> None:
    save_base(tmp_path / "plain")
    folder = base(tmp_path, "llama", given(use_cool_scaling=True, pretraining_tp=2))
    changed(folder, lambda config: {**config, "rope_parameters": {**config["rope_parameters"], "mrope_section": [8]}})
    text = f'base = "{folder}"\ndtype = "float32"\n'
    asked = read_recipe(text + 'ignored_config_keys = ["use_cool_scaling", "pretraining_tp", "mrope_section"]', "x")
    manifest = build_encoder(asked, tmp_path / "encoder")
    plain = build_encoder(recipe_from("x", base=str(tmp_path / "plain"), dtype="float32"), tmp_path / "without")
    assert (tmp_path / "encoder/config.json").read_text() == (tmp_path / "without/config.json").read_text()
    assert manifest.embedding_space == plain.embedding_space
    assert read_manifest(tmp_path / "encoder").recipe == asked
    assert not [problem for check in verify_encoder(tmp_path / "encoder") for problem in check.problems]
    # Only a recipe that asks for it has another fingerprint than before there was such a key.
    assert asked.fingerprint != read_recipe(text, "x").fingerprint
    assert read_recipe("base = 'b'", "x").fingerprint == FINGERPRINT


def test_a_key_is_ignored_only_if_it_would_be_refused(tmp_path: Path) -> None:
    folder = base(tmp_path, "mistral", given(use_cool_scaling=True))
    for key in ("use_col_scaling", "sliding_window"):
        recipe = recipe_from("x", base=str(folder), ignored_config_keys=["use_cool_scaling", key])
        with pytest.raises(
            CheckpointError, match=rf"ignored_config_keys name {key}, which .*config.json does not have"
        ):
            build_encoder(recipe, tmp_path / "encoder")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"is a GGUF base, which has no config\.json"):
        open_checkpoint(tmp_path / "gguf", ["use_cool_scaling"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_family_is_listed(family: str) -> None:
    """A field that a later transformers adds shows here: whether it moves vectors has to be read in its model."""
    of_all = vars(PreTrainedConfig()).keys() | vars(GenerationConfig()).keys() | {"_sliding_window_pattern"}
    fields = vars(CONFIG_MAPPING[family]()).keys() - of_all
    assert fields <= MOVING.keys() | UNMOVING | UNMOVING_VALUES.keys() | set(LAYOUT)


STORED: dict[str, Any] = {
    **{"model_type": "gemma3_text", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 32, "num_hidden_layers": 2, "hidden_activation": "silu", "rms_norm_eps": 1e-6},
    **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}},
}
OTHER = {"layer_types": ["full_attention", "full_attention"], "rope_parameters": {"rope_theta": 1e4}}


@pytest.mark.parametrize("key", MOVING)
def test_each_setting_that_moves_vectors_counts(key: str) -> None:
    stored = {**STORED, "hidden_activation": None, "hidden_act": "silu"} if key == "hidden_act" else STORED
    assert vector_settings({**stored, key: OTHER.get(key, 7)}) != vector_settings(stored)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("key", MOVING_ROPE)
def test_each_setting_of_rope_counts_in_each_type_of_layer(key: str, kind: str) -> None:
    rope = STORED["rope_parameters"]
    other = {**STORED, "rope_parameters": {**rope, kind: {**rope[kind], key: 7}}}
    assert vector_settings(other) != vector_settings(STORED)


LLAMA = {
    **{
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
    },
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


@pytest.mark.parametrize(
    ("stored", "change"),
    [
        (
            STORED,
            {"a_new_default": 3, "initializer_range": 0.5, "use_cache": True, "vocab_size": 1, "dtype": "bfloat16"},
        ),
        (STORED, {"attention_bias": False, "use_bidirectional_attention": None, "attn_logit_softcapping": None}),
        (STORED, {"hidden_activation": None, "hidden_act": "silu"}),
        (LLAMA, {"num_key_value_heads": 4, "head_dim": 16, "mlp_bias": False, "sliding_window": None}),
        (LLAMA, {"layer_types": ["full_attention"] * 2}),
        (LLAMA, {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": {"rope_theta": 10000}}}),
        (LLAMA, {"rope_parameters": {"rope_theta": 10000, "type": "default", "partial_rotary_factor": 1.0}}),
        (
            {**LLAMA, "sliding_window": 16},
            {"layer_types": ["sliding_attention"] * 2, "max_window_layers": 28, "use_sliding_window": True},
        ),
    ],
)
def test_what_moves_no_vector_does_not_count(stored: dict[str, Any], change: dict[str, Any]) -> None:
    assert vector_settings({**stored, **change}) == vector_settings(stored)


def test_the_embedding_space_is_of_settings_and_not_of_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    manifest = build_tiny(folder, "gemma3_text")
    space = manifest.embedding_space
    stored = json.loads((folder / "config.json").read_text())
    changed(folder, lambda config: {"a_new_default": 3, **{key: config[key] for key in config if key != "use_cache"}})
    assert manifest.sealed(folder).embedding_space == space
    for change in (given(rms_norm_eps=1e-3), given(sliding_window=3), given(layer_types=["full_attention"] * 3)):
        (folder / "config.json").write_text(json.dumps(stored))
        changed(folder, change)
        assert manifest.sealed(folder).embedding_space != space
    (folder / "config.json").write_text(json.dumps(stored))
    causal = manifest.model_copy(update={"attention": "causal"})
    assert causal.sealed(folder).embedding_space != space
    assert manifest.sealed(folder).embedding_space == space
