"""A base model's tensors, read one at a time from any of several file formats.

Names are the bare decoder's (`layers.0.self_attn.q_proj.weight`). Reading a tensor costs the memory of that tensor,
not of the model. Files are only ever read as data: safetensors, torch files with weights_only, GGUF.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from model_store.json_text import read_json_object, unreadable

# Its stored name ends so, whatever stands before it.
_OUTPUT_HEAD = "lm_head.weight"


class Checkpoint(ABC):
    """The decoder's tensors by name, and its transformers configuration."""

    config: Any
    names: frozenset[str]

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU, in the dtype it is stored in."""

    @abstractmethod
    def output_head(self) -> Tensor | None:
        """The (V, D) weights of the output head, None if they are not stored; encoders don't need them."""


def open_checkpoint(folder: Path, ignored_config_keys: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a folder: safetensors if there are any, else torch files, else one GGUF file.

    Raises:
        CheckpointError: if there is none, if its weights are quantised in a way that can't be merged into, or if its
            config.json asks for something that is not reproduced, beyond the `ignored_config_keys`.
    """
    if any(not path.name.startswith("adapter_") for path in folder.glob("*.safetensors")):
        return _SafetensorsCheckpoint(folder, ignored_config_keys)
    if any(folder.glob("pytorch_model*.bin")):
        return _TorchCheckpoint(folder, ignored_config_keys)
    gguf_files = sorted(folder.glob("*.gguf"))
    if gguf_files and ignored_config_keys:
        raise CheckpointError(f"{folder} is a GGUF base, which has no config.json: leave ignored_config_keys out")
    if len(gguf_files) == 1:
        return _GgufCheckpoint(gguf_files[0])
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
    with _named(path, f"makes no {model_type} decoder"):
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw)).get_text_config()
    refuse_unknown(path, (raw.get("text_config") or {}) if model_type in TEXT_MODEL_OF else raw, config, ignored)
    with _named(path, f"makes no {model_type} decoder"):
        if ignored:
            config = CONFIG_MAPPING[model_type].from_dict(without(raw, ignored)).get_text_config()
        decoder_on_meta(config)
    return config


@contextmanager
def _named(path: Path, complaint: str) -> Iterator[None]:
    """Make any error name the file: transformers and gguf raise a dozen unrelated types for bad content."""
    try:
        yield
    except Exception as error:
        raise unreadable(path, complaint, error) from error


def _by_decoder_name(stored_names: Iterable[str]) -> dict[str, str]:
    """Decoder name → stored name, for the tensors that an encoder needs."""
    found: dict[str, str] = {}
    for stored in filter(is_encoder_tensor, stored_names):
        name = decoder_name(stored)
        if name in found:
            raise CheckpointError(f"{stored} and {found[name]} are both {name}: remove one of them")
        found[name] = stored
    return found


class _SafetensorsCheckpoint(Checkpoint):
    def __init__(self, folder: Path, ignored_config_keys: Collection[str]) -> None:
        self.config = _decoder_config(folder, ignored_config_keys)
        self._files: dict[str, Any] = {}
        stored: dict[str, str] = {}
        for path in _shards(folder, "model.safetensors.index.json", "*.safetensors"):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise unreadable(path, "is not a readable safetensors file", error) from error
            self._files[path.name] = file
            stored.update(dict.fromkeys(file.keys(), path.name))
        self._stored = _by_decoder_name(stored)
        self._file_of = stored
        self.names = frozenset(self._stored)

    def tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        return self._read(stored)

    def output_head(self) -> Tensor | None:
        name = next((name for name in self._file_of if name.endswith(_OUTPUT_HEAD)), None)
        return None if name is None else self._read(name)

    def _read(self, stored: str) -> Tensor:
        tensor: Tensor = self._files[self._file_of[stored]].get_tensor(stored)
        return tensor


class _TorchCheckpoint(Checkpoint):
    def __init__(self, folder: Path, ignored_config_keys: Collection[str]) -> None:
        self.config = _decoder_config(folder, ignored_config_keys)
        stored: dict[str, Tensor] = {}
        for path in _shards(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin"):
            stored.update(load_torch_file(path))
        self._tensors = {name: stored[original] for name, original in _by_decoder_name(stored).items()}
        self._head = next((tensor for name, tensor in stored.items() if name.endswith(_OUTPUT_HEAD)), None)
        self.names = frozenset(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def output_head(self) -> Tensor | None:
        return self._head


class _GgufCheckpoint(Checkpoint):
    """Dequantises with the gguf package; names, shapes and layouts are mapped by transformers."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise CheckpointError("a GGUF base needs the gguf package: pip install 'llm2vec-service[demo]'") from error
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        with _named(path, "is cut short, damaged or of an unknown kind"):
            reader = GGUFReader(path)
            self.config = AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            ).get_text_config()
        # The stored encoder has plain weights, so it must not say that they are quantised.
        self.config.__dict__.pop("quantization_config", None)
        with _named(path, f"makes no {self.config.model_type} decoder"):
            set_rope(self.config, reader)
            processor = TENSOR_PROCESSORS.get(gguf_architecture(reader), TensorProcessor)
            self._processor = processor(config=self.config.to_dict())
            mapped = get_gguf_hf_weights_map(decoder_on_meta(self.config), self._processor)
        self._tensors = {}
        self._head: Any = None
        for tensor in reader.tensors:
            # An unmapped tensor keeps its own name, so that the builder reports it. No encoder has an output head.
            name = decoder_name(mapped.get(tensor.name, tensor.name))
            if tensor.name == "output.weight":
                self._head = tensor
            elif tensor.name not in ROPE_TENSORS:
                self._tensors[name] = tensor
        self.names = frozenset(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._dequantized(self._tensors[name])

    def output_head(self) -> Tensor | None:
        return None if self._head is None else self._dequantized(self._head)

    def _dequantized(self, stored: Any) -> Tensor:
        from gguf import dequantize

        values = dequantize(stored.data, stored.tensor_type)
        return torch.from_numpy(self._processor.process(weights=values, name=stored.name).weights.copy())


def decoder_on_meta(config: Any) -> Any:
    """The transformers decoder for a configuration, without memory: names and shapes only."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """A torch file's tensors, mapped from disk rather than read; nothing in it is executed.

    Raises:
        CheckpointError: if it is not a plain file of tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen unrelated types for a bad file
        complaint = "is cut short, or not a plain file of tensors (convert it to safetensors)"
        raise unreadable(path, complaint, error) from error
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
