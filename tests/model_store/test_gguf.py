"""GGUF bases as llama.cpp's converter writes them: tensors, RoPE, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model_store.build.build import build_encoder
from model_store.build.verify import verify_encoder
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.errors import CheckpointError
from model_store.recipe import recipe_from
from tests.tiny import normalized, padded_vectors, random_rows, tiny_config, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="GGUF bases need the extra `demo`")

ROWS = random_rows([5, 300, 1, 12])

# RoPE's theta in all of these models, and the context before scaling.
THETA = 500_000.0
ORIGINAL = 64


def twin_with(rope: dict[str, Any]) -> Any:
    """A seeded Llama with its output head and this RoPE, as transformers has it."""
    config = tiny_config("llama")
    config.rope_parameters = {"rope_theta": THETA, "rope_type": "default", **rope}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def save_gguf(folder: Path, model: Any, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    """With llama.cpp's own tensor names, and rows of q and k in another order."""
    folder.mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = model.config
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](f"llama.rope.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", values.copy())
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors() -> list[float]:
    """What llama.cpp's converter makes of Llama 3.1's scaling by 8 between the wavelengths 16 and 64."""
    divisors = []
    for place in range(0, 16, 2):
        wavelength = 2 * math.pi * THETA ** (place / 16)
        smooth = min(max((ORIGINAL / wavelength - 1) / (4 - 1), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / 8 + smooth))
    return divisors


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SHORT, LONG = [1.0 + place / 4 for place in range(8)], [2.0 + place for place in range(8)]


@pytest.mark.parametrize(
    ("rope", "metadata", "tensors"),
    [
        ({}, {}, {}),
        ({}, {"scaling.type": "none", "scaling.factor": 4.0}, {}),
        ({}, {"scaling.type": "yarn", "scaling.factor": 1.0, "scaling.finetuned": True}, {}),
        ({}, {}, {"rope_freqs.weight": [1.0] * 8}),
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}, {}),
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.factor": 4.0}, {}),
        ({"rope_type": "linear", "factor": 2.0}, {"scale_linear": 2.0}, {}),
        (
            YARN,
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": ORIGINAL},
            {},
        ),
        (
            {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.5 * (1 + 0.1 * math.log(4))},
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": ORIGINAL,
                "scaling.attn_factor": 0.5,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0,
            },
            {},
        ),
        (LLAMA3, {}, {"rope_freqs.weight": llama3_divisors()}),
    ],
)
def test_the_vectors_are_those_of_the_same_model_in_safetensors(
    tmp_path: Path, rope: dict[str, Any], metadata: dict[str, Any], tensors: dict[str, Any]
) -> None:
    twin = twin_with(rope)
    save_gguf(tmp_path / "base", twin, metadata, tensors)
    manifest = build_encoder(recipe_from("x", base=str(tmp_path / "base"), dtype="float32"), tmp_path / "encoder")
    assert manifest.max_positions == twin.config.max_position_embeddings
    assert not [problem for check in verify_encoder(tmp_path / "encoder") for problem in check.problems]
    encoder = Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")
    expected = normalized(padded_vectors(twin.model, ROWS))
    assert (normalized(encoder.encode(PackedBatch.pack(ROWS, "mean"))) - expected).abs().max() < 1e-5
    if rope:  # a control: without it the vectors are others
        unscaled = normalized(padded_vectors(twin_with({}).model, ROWS))
        assert (unscaled - expected).abs().max() > 1e-2


def test_divisors_by_the_length_of_a_row_keep_to_short_rows(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.25}
    twin = twin_with({**rope, "original_max_position_embeddings": ORIGINAL})
    metadata = {"scaling.original_context_length": ORIGINAL, "scaling.attn_factor": 1.25}
    tensors = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}
    save_gguf(tmp_path / "base", twin, metadata, tensors)
    manifest = build_encoder(recipe_from("x", base=str(tmp_path / "base"), dtype="float32"), tmp_path / "encoder")
    assert manifest.max_positions == ORIGINAL
    rows = random_rows([5, ORIGINAL])
    encoder = Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")
    expected = normalized(padded_vectors(twin.model, rows))
    assert (normalized(encoder.encode(PackedBatch.pack(rows, "mean"))) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("metadata", "tensors", "named"),
    [
        ({"scaling.alpha": 1000.0}, {}, r"llama\.rope\.scaling\.alpha, 1000\.0"),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_log_multiplier": 0.5},
            {},
            "yarn_log_multiplier",
        ),
        ({"scaling.attn_factor": 2.0}, {}, r"scaling\.attn_factor"),
        ({"freq_base_swa": 10_000.0}, {}, "freq_base_swa"),
        ({"dimension_sections": 8}, {}, "dimension_sections"),
        ({"something_new": 8}, {}, "something_new"),
        ({"scaling.type": "longrope", "scaling.factor": 4.0}, {}, "longrope"),
        ({"scaling.factor": 4.0}, {"rope_freqs.weight": SHORT}, "rope_freqs.weight"),
        ({}, {"rope_factors_long.weight": LONG}, "rope_factors_long.weight"),
    ],
)
def test_what_moves_rope_and_is_not_reproduced_is_named(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], named: str
) -> None:
    save_gguf(tmp_path / "base", twin_with({}), metadata, tensors)
    with pytest.raises(CheckpointError, match=rf"model\.gguf .*{named}"):
        build_encoder(recipe_from("x", base=str(tmp_path / "base")), tmp_path / "encoder")


def test_a_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    save_gguf(tmp_path / "whole", twin_with({}), {}, {})
    content = (tmp_path / "whole" / "model.gguf").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name, left, told in (
        ("tensors", content[:60_000], "cut short"),
        ("metadata", content[:300], "cut short"),
        ("magic", content[:2], "cut short"),
        ("nothing", b"", "cut short"),
        ("another", b"GGML" + content[4:], "unknown kind"),
        ("pointer", pointer, "is a Git LFS pointer: fetch it with git lfs pull"),
    ):
        base = tmp_path / name
        base.mkdir()
        shutil.copyfile(tmp_path / "whole" / "tokenizer.json", base / "tokenizer.json")
        (base / "model.gguf").write_bytes(left)
        with pytest.raises(CheckpointError, match=rf"{name}/model\.gguf .*{told}"):
            build_encoder(recipe_from("x", base=str(base)), tmp_path / "encoder")


def test_a_config_beside_a_gguf_file_changes_nothing(tmp_path: Path) -> None:
    """The file describes itself."""
    twin = twin_with(LLAMA3)
    save_gguf(tmp_path / "base", twin, {}, {"rope_freqs.weight": llama3_divisors()})
    (tmp_path / "base" / "config.json").write_text(json.dumps(twin_with({}).config.to_dict()))
    build_encoder(recipe_from("x", base=str(tmp_path / "base"), dtype="float32"), tmp_path / "encoder")
    encoder = Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")
    expected = normalized(padded_vectors(twin.model, ROWS))
    assert (normalized(encoder.encode(PackedBatch.pack(ROWS, "mean"))) - expected).abs().max() < 1e-5
