"""A base model's tensors, read one at a time from any of several file formats.

Names are the bare decoder's (`layers.0.self_attn.q_proj.weight`). Reading a tensor costs the memory of that tensor,
not of the model. Files are only ever read as data: safetensors, torch files with weights_only, GGUF.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig

from model_store.architectures import (
    BIDIRECTIONAL_NAMES,
    TEXT_MODEL_OF,
    architecture_of,
    decoder_name,
    is_encoder_tensor,
)
from model_store.build.gguf_rope import ROPE_TENSORS, gguf_architecture, set_rope
from model_store.build.unknown_keys import refuse_unknown, without
from model_store.errors import CheckpointError
from model_store.json_text import read_json_object, reading

# Its stored name ends so, whatever stands before it.
_OUTPUT_HEAD = "lm_head.weight"

_BAD_SAFETENSORS = "is not a readable safetensors file"


class Checkpoint:
    """The decoder's tensors by name, and its transformers configuration."""

    def __init__(self, config: Any, stored_names: Collection[str], read: Callable[[str], Tensor]) -> None:
        """`read` gives the tensor of a stored name, on the CPU and in the dtype that it is stored in.

        Raises:
            CheckpointError: if two stored names are one tensor's.
        """
        self.config = config
        self._read = read
        self._stored: dict[str, str] = {}
        for stored in filter(is_encoder_tensor, stored_names):
            name = decoder_name(stored)
            if name in self._stored:
                raise CheckpointError(f"{stored} and {self._stored[name]} are both {name}: remove one of them")
            self._stored[name] = stored
        self._head = next((name for name in stored_names if name.endswith(_OUTPUT_HEAD)), None)
        self.names = frozenset(self._stored)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self._read(self._stored[name])

    def output_head(self) -> Tensor | None:
        """The (V, D) weights of the output head, None if they are not stored; encoders don't need them."""
        return None if self._head is None else self._read(self._head)


def open_checkpoint(folder: Path, ignored_config_keys: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a folder: safetensors if there are any, else torch files, else one GGUF file.

    Raises:
        CheckpointError: if there is none, if its weights are quantised in a way that can't be merged into, or if its
            config.json asks for something that is not reproduced, beyond the `ignored_config_keys`.
    """
    if any(not path.name.startswith("adapter_") for path in folder.glob("*.safetensors")):
        return _of_safetensors(folder, _decoder_config(folder, ignored_config_keys))
    if any(folder.glob("pytorch_model*.bin")):
        return _of_torch_files(folder, _decoder_config(folder, ignored_config_keys))
    gguf_files = sorted(folder.glob("*.gguf"))
    if gguf_files and ignored_config_keys:
        raise CheckpointError(f"{folder} is a GGUF base, which has no config.json: leave ignored_config_keys out")
    if len(gguf_files) == 1:
        return _of_gguf(gguf_files[0])
    if gguf_files:
        raise CheckpointError(
            f"{folder} holds {len(gguf_files)} GGUF files: name one of them, as in {folder}:{gguf_files[0].name}"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter: give it with --adapter, and the model it was trained for as base"
        )
    raise CheckpointError(f"{folder} holds no weights: neither *.safetensors, pytorch_model*.bin nor *.gguf")


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it was written (transformers drops and overwrites some keys), or {} where there is none."""
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}


def _decoder_config(folder: Path, ignored: Collection[str]) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    raw = read_json_object(path)
    if quantization := raw.pop("quantization_config", None):
        stored = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"the base in {folder} is stored as {stored or 'a quantised format'}: give the unquantised base model"
        )
    raw.pop("auto_map", None)  # points at remote code, which never runs
    model_type = str(raw.get("model_type", ""))
    raw["model_type"] = model_type = BIDIRECTIONAL_NAMES.get(model_type, model_type)
    architecture_of(TEXT_MODEL_OF.get(model_type, model_type))
    for key in ("dtype", "torch_dtype"):
        if raw.get(key) and not isinstance(getattr(torch, str(raw[key]), None), torch.dtype):
            raise CheckpointError(f"{path} has the {key} {raw[key]!r}, which torch does not know")
    with reading(path, f"makes no {model_type} decoder"):
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw)).get_text_config()
    refuse_unknown(path, (raw.get("text_config") or {}) if model_type in TEXT_MODEL_OF else raw, config, ignored)
    with reading(path, f"makes no {model_type} decoder"):
        if ignored:
            config = CONFIG_MAPPING[model_type].from_dict(without(raw, ignored)).get_text_config()
        decoder_on_meta(config)
    return config


def _of_safetensors(folder: Path, config: Any) -> Checkpoint:
    files: dict[str, Any] = {}
    for path in _shards(folder, "model.safetensors.index.json", "*.safetensors"):
        with reading(path, _BAD_SAFETENSORS):
            file = safe_open(path, framework="pt")
        files.update(dict.fromkeys(file.keys(), file))
    return Checkpoint(config, files, lambda name: files[name].get_tensor(name))


def _of_torch_files(folder: Path, config: Any) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    for path in _shards(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin"):
        tensors.update(_load_torch_file(path))
    return Checkpoint(config, tensors, tensors.__getitem__)


def _of_gguf(path: Path) -> Checkpoint:
    """Dequantised by the gguf package; transformers maps names, shapes and layouts."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise CheckpointError("a GGUF base needs the gguf package: pip install 'llm2vec-service[demo]'") from error
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with reading(path, "is cut short, damaged or of an unknown kind"):
        reader = GGUFReader(path)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).get_text_config()
    # The stored encoder has plain weights, so it must not say that they are quantised.
    config.__dict__.pop("quantization_config", None)
    with reading(path, f"makes no {config.model_type} decoder"):
        set_rope(config, reader)
        processor = TENSOR_PROCESSORS.get(gguf_architecture(reader), TensorProcessor)(config=config.to_dict())
        mapped = {**get_gguf_hf_weights_map(decoder_on_meta(config), processor), "output.weight": _OUTPUT_HEAD}
    # An unmapped tensor keeps its own name, so that the builder reports it.
    stored = {mapped.get(found.name, found.name): found for found in reader.tensors if found.name not in ROPE_TENSORS}

    def read(name: str) -> Tensor:
        values = dequantize(stored[name].data, stored[name].tensor_type)
        return torch.from_numpy(processor.process(weights=values, name=stored[name].name).weights.copy())

    return Checkpoint(config, stored, read)


def decoder_on_meta(config: Any) -> Any:
    """The transformers decoder for a configuration, without memory: names and shapes only."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def load_tensors(safe: Path, torch_file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file if there is no such file.

    Raises:
        CheckpointError: if the file is not a plain file of tensors.
    """
    if not safe.is_file():
        return _load_torch_file(torch_file)
    with reading(safe, _BAD_SAFETENSORS):
        return load_file(safe)


def _load_torch_file(path: Path) -> dict[str, Tensor]:
    """A torch file's tensors, mapped from disk rather than read; nothing in it is executed."""
    with reading(path, "is cut short, or not a plain file of tensors (convert it to safetensors)"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds other things than named tensors: convert it to safetensors")
    return tensors


def _shards(folder: Path, index_name: str, pattern: str) -> list[Path]:
    """The weight files that an index lists; without an index the only weight file in the folder."""
    index = folder / index_name
    if not index.is_file():
        paths = [path for path in sorted(folder.glob(pattern)) if not path.name.startswith("adapter_")]
        # Beside model.safetensors some repositories keep the same weights under another layout's names.
        paths = [path for path in paths if path.stem in ("model", "pytorch_model")] or paths
        if len(paths) != 1:
            raise CheckpointError(f"{folder} holds {len(paths)} weight files and no {index_name}")
        return paths
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or not (folder / name).is_file():
            raise CheckpointError(f"{index} lists {name}, which is not in {folder}")
    return [folder / name for name in names]
