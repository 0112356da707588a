"""Files that are not what their names promise: one sentence with the path and the cause, and never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_store.build.adapters import AdapterError
from model_store.build.build import build_encoder
from model_store.errors import CheckpointError, UserError
from model_store.recipe import recipe_from
from tests.tiny import save_adapter, save_base, tiny_model

Spoil = Callable[[Path], None]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PULL = "is a Git LFS pointer: fetch it with git lfs pull"
INDEX = "model.safetensors.index.json"


def write(content: bytes) -> Spoil:
    def spoil(path: Path) -> None:
        path.write_bytes(content)

    return spoil


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_values(**values: Any) -> Spoil:
    """Change keys of a JSON object."""

    def spoil(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


BASE_FILES: list[tuple[str, str, Spoil, str]] = [
    *(
        (layout, name, write(LFS), PULL)
        for layout, name in (
            ("safetensors", "config.json"),
            ("safetensors", "model.safetensors"),
            ("safetensors", "tokenizer.json"),
            ("safetensors", "tokenizer_config.json"),
            ("safetensors", "special_tokens_map.json"),
            ("safetensors", "llm2vec_config.json"),
            ("sharded", INDEX),
            ("sharded", "model-00002-of-00002.safetensors"),
            ("bin", "pytorch_model.bin"),
        )
    ),
    *(
        ("safetensors", name, write(content), told)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "llm2vec_config.json")
        for content, told in (
            (b"[1]", "is not a JSON object"),
            (b"null", "is not a JSON object"),
            (b"", "is not valid JSON"),
            (b'{"a":', "is not valid JSON"),
            (b'{"a": "\xff"}', "is not valid JSON"),
        )
    ),
    ("sharded", INDEX, write(b"[]"), "is not a JSON object"),
    ("sharded", INDEX, write(b'{"weight_map": {"a": 1}}'), "has no weight_map"),
    ("safetensors", "model.safetensors", cut, "is not a readable safetensors file"),
    ("bin", "pytorch_model.bin", cut, "is cut short"),
    ("bin", "pytorch_model.bin", write(b""), "is cut short"),
    ("safetensors", "tokenizer.json", write(b"{}"), "is no tokenizer"),
    ("safetensors", "llm2vec_config.json", write(b'{"pooling_mode": "max"}'), "pooling"),
    *(
        ("safetensors", "config.json", with_values(**values), told)
        for values, told in (
            ({"quantization_config": "gptq"}, "gptq"),
            ({"quantization_config": {"bits": 4}}, "a quantised format"),
            ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "makes no llama decoder: .*'spiral'"),
            ({"rope_parameters": "linear"}, "makes no llama decoder: .*rope_parameters"),
            ({"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}, "makes no llama decoder"),
            ({"torch_dtype": "float7"}, "torch_dtype 'float7'"),
            ({"dtype": 16}, "dtype 16"),
            ({"hidden_act": "gulp"}, "makes no llama decoder: .*'gulp'"),
            ({"hidden_size": "64"}, "makes no llama decoder: .*hidden_size"),
            ({"num_attention_heads": 0}, "makes no llama decoder"),
        )
    ),
]


@pytest.mark.parametrize(("layout", "name", "spoil", "told"), BASE_FILES)
def test_a_base_with_a_spoilt_file(tmp_path: Path, layout: str, name: str, spoil: Spoil, told: str) -> None:
    save_base(tmp_path / "base", layout=layout)
    spoil(tmp_path / "base" / name)
    with pytest.raises(UserError, match=told) as caught:
        build_encoder(recipe_from("x", base=str(tmp_path / "base")), tmp_path / "encoder")
    assert str(tmp_path / "base") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("adapter_config.json", write(LFS), PULL),
        ("adapter_config.json", write(b"[1]"), "is not a JSON object"),
        ("adapter_config.json", with_values(lora_alpha="x"), "lora_alpha 'x'"),
        ("adapter_config.json", with_values(rank_pattern=[1]), r"rank_pattern \[1\]"),
        ("adapter_config.json", with_values(alpha_pattern={"q_proj": None}), "alpha_pattern"),
        ("adapter_model.safetensors", write(LFS), PULL),
        ("adapter_model.safetensors", cut, "is not a readable safetensors file"),
        ("config.json", write(LFS), PULL),
        ("tokenizer.json", write(LFS), PULL),
        ("llm2vec_config.json", write(LFS), PULL),
    ],
)
def test_an_adapter_with_a_spoilt_file(tmp_path: Path, name: str, spoil: Spoil, told: str) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    spoil(tmp_path / "adapter" / name)
    recipe = recipe_from("x", base=str(tmp_path / "base"), adapters=[str(tmp_path / "adapter")])
    with pytest.raises(
        (AdapterError, CheckpointError), match=f"{re.escape(str(tmp_path / 'adapter' / name))} .*{told}"
    ):
        build_encoder(recipe, tmp_path / "encoder")


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    """As some tools write what they have no value for."""
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tiny_model("llama"), 0)
    with_values(quantization_config=None)(tmp_path / "base" / "config.json")
    with_values(rank_pattern=None, alpha_pattern=None)(tmp_path / "adapter" / "adapter_config.json")
    recipe = recipe_from("x", base=str(tmp_path / "base"), adapters=[str(tmp_path / "adapter")])
    assert build_encoder(recipe, tmp_path / "encoder").width == 64


def test_a_file_that_is_not_read_may_be_a_pointer(tmp_path: Path) -> None:
    """Some clone a repository and fetch the weights in one format alone."""
    save_base(tmp_path / "base")
    for name in ("pytorch_model.bin", "tokenizer.model", "model.gguf"):
        (tmp_path / "base" / name).write_bytes(LFS)
    assert build_encoder(recipe_from("x", base=str(tmp_path / "base")), tmp_path / "encoder").width == 64
