"""What config.json says of a decoder's size, held against the decoder itself."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModel

from model_store.architectures import UnsupportedArchitectureError
from model_store.build.sources import SourceError, shape_of
from model_store.encoder.attention import implementation_name
from model_store.errors import CheckpointError
from model_store.recipe import packaged_recipes
from model_store.shape import Shape, known_configs
from tests.tiny import FAMILIES, WINDOW, product_weights, save_base, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_parameters(family: str) -> None:
    model, shape = tiny_model(family), Shape.read(tiny_config(family).to_dict())
    table = model.get_input_embeddings().weight
    tensors = {tensor.data_ptr(): tensor for tensor in model.parameters() if tensor.dim() > 1}
    assert shape.linear_parameters == product_weights(model)
    assert shape.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert shape.parameters - shape.linear_parameters == table.numel()


def test_windows_are_of_the_layers_that_have_them() -> None:
    assert Shape.read(tiny_config("qwen2").to_dict()).windows == (None, WINDOW, WINDOW)
    assert Shape.read(tiny_config("phi3").to_dict()).windows == (WINDOW,) * 3
    assert Shape.read(tiny_config("mistral").to_dict()).windows == (None,) * 3  # which LLM2Vec attends to all of
    assert Shape.read(known_configs()["demo:"]).windows == ((512,) * 5 + (None,)) * 3


def test_a_window_bounds_whom_a_token_meets() -> None:
    shape = Shape.read(tiny_config("phi3").to_dict())
    width = shape.layers * shape.heads * shape.head_width
    assert shape.attention_flops([10]) == 4 * 10 * 10 * width
    assert shape.attention_flops([100, 100]) == 2 * 4 * 100 * (2 * WINDOW + 1) * width
    assert shape.flops_per_token(100) == 2 * shape.linear_parameters + 4 * (2 * WINDOW + 1) * width


def test_every_packaged_recipe_s_base_is_known_and_has_the_parameters_that_the_recipe_says() -> None:
    recipes = {recipe.base: recipe for recipe in packaged_recipes().values()}
    assert recipes.keys() - known_configs().keys() == {"nvidia/Nemotron-3-Embed-1B-BF16"}  # not published elsewhere
    for base in known_configs():
        assert shape_of(base).parameters == pytest.approx(recipes[base].parameters, rel=1e-3), base


def test_fp8_weights_take_half_but_for_the_embedding_table() -> None:
    shape = shape_of("princeton-nlp/Sheared-LLaMA-1.3B")
    assert shape.weight_bytes("bfloat16") == 2 * shape.parameters
    assert shape.weight_bytes("float32") == 4 * shape.parameters
    assert shape.weight_bytes("fp8") == shape.linear_parameters + 2 * 32000 * 2048


def test_a_folder_s_config_fills_in_what_it_does_not_say(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "gemma3_text")
    assert shape_of(str(tmp_path / "base")) == Shape.read(tiny_config("gemma3_text").to_dict())


def test_a_multimodal_wrapper_s_decoder() -> None:
    text = tiny_config("gemma3_text").to_dict()
    assert Shape.read({"model_type": "gemma3", "text_config": text}) == Shape.read(text)


def test_what_leads_nowhere_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no config.json in .* give a stored encoder"):
        shape_of(str(tmp_path))
    with pytest.raises(SourceError, match="use a path that exists"):
        shape_of(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedArchitectureError, match="llama, mistral"):
        shape_of(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "describes no llama decoder: .*hidden_size"),
        ('{"model_type": "gemma3", "text_config": 7}', "describes no gemma3 decoder: "),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer: fetch it with git lfs pull"),
    ],
)
def test_a_malformed_config_is_told_with_its_path_and_the_cause(tmp_path: Path, config: str, told: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/config.json {told}") as caught:
        shape_of(str(tmp_path))
    assert "\n" not in str(caught.value)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


@pytest.mark.parametrize("base", ["demo:", "princeton-nlp/Sheared-LLaMA-1.3B", "meta-llama/Meta-Llama-3-8B-Instruct"])
def test_a_batch_takes_what_the_shape_says_or_a_little_less(base: str) -> None:
    """The real shapes with two layers, tensors without content; layers as they are before they are compiled."""
    tokens, config = 4096, {**known_configs()[base], "num_hidden_layers": 2}
    config["layer_types"] = ["full_attention"] * 2
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        made = CONFIG_MAPPING[config.pop("model_type")](**config)
        model = AutoModel.from_config(made, dtype=torch.bfloat16, attn_implementation=implementation_name("sdpa"))
        ids = torch.zeros(1, tokens, dtype=torch.long)
        cu_seqlens = torch.arange(0, tokens + 1, 128, dtype=torch.int32)
        with Live() as live:
            model(input_ids=ids, position_ids=ids, use_cache=False, cu_seqlens=cu_seqlens, longest=128)
    assert 0.8 * shape_of(base).activation_bytes(tokens) < live.peak < shape_of(base).activation_bytes(tokens)
