"""A stored encoder on a device: packed batches in, one vector a text out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from model_store.attention import Kernel, choose_kernel, implementation_name
from model_store.cpu_linear import can_pack, pack_linears
from model_store.manifest import Manifest, read_manifest
from model_store.packing import PackedBatch
from model_store.pooling import pool
from model_store.quantization import Quantization, quantize

# T packed tokens, B texts, D width


# A smaller batch gets a text of filler. Below about 12 rows the CPU's float32 matrix products take another path, and a
# short text would get other last bits alone than in company; a compiled layer must never see one row only.
LEAST_TOKENS = 16

# The attention kernels take a longest text of 1 for decoding; more than the true length costs nothing.
_LEAST_LONGEST = 8


class DeviceError(ValueError):
    """A device or dtype that this machine can't serve."""


@dataclass(frozen=True)
class Encoder:
    """The decoder with bidirectional attention, ready to encode."""

    model: Any
    manifest: Manifest
    device: torch.device
    dtype: torch.dtype
    kernel: Kernel

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "auto",
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        attention: Kernel | Literal["auto"] = "auto",
        quantization: Quantization = "none",
    ) -> Encoder:
        """Load a stored encoder; its weights take their size in memory once.

        Raises:
            StoreError: if the folder is no stored encoder.
            DeviceError: for a device that is not there.
            AttentionError: if the attention kernel asked for can't serve this model on this device.
            QuantizationError: if the device or the model can't do with the quantisation asked for.
        """
        manifest = read_manifest(folder)
        on = choose_device(device)
        as_dtype = choose_dtype(dtype, on)
        disable_progress_bar()
        model = AutoModel.from_pretrained(
            folder,
            dtype=as_dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
        )
        softcap = getattr(model.config, "attn_logit_softcapping", None) is not None
        kernel = choose_kernel(attention, on, as_dtype, softcap)
        model.set_attn_implementation(implementation_name(kernel))
        quantize(model, quantization, on)
        return cls(model.eval().requires_grad_(False).to(on), manifest, on, as_dtype, kernel)

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch) -> Tensor:
        """Token vectors, shape (T, D) in the encoder's dtype, on its device; `batch` must be there too."""
        output = self.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            cu_seqlens=batch.cu_seqlens,
            longest=max(batch.longest, _LEAST_LONGEST),
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def encode(self, batch: PackedBatch) -> Tensor:
        """Text vectors, shape (B, D) float32 on the host, not normalised."""
        on_device = batch.filled_up_to(LEAST_TOKENS).to(self.device)
        return pool(self.hidden(on_device), on_device)[: len(batch.cu_seqlens) - 1].cpu()

    def pack_weights(self) -> None:
        """On a CPU with 16-bit products, have the linear layers' weights as its products want them; else do nothing."""
        if can_pack(self.device, self.dtype):
            pack_linears(self.model)

    def compile_layers(self) -> None:
        """Have each layer compiled at the next use: one graph for all of a kind, for any number of tokens and texts.

        The first batch then takes up to half a minute, or seconds where torch's compile cache has the layers.
        """
        for layer in self.model.layers:
            layer.compile(dynamic=True, fullgraph=True)

    def uncompile_layers(self) -> None:
        """Back to what `load` gave."""
        for layer in self.model.layers:
            layer._compiled_call_impl = None


def choose_device(asked: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU; otherwise a torch device name.

    Raises:
        DeviceError: if that device is not on this machine.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"{asked!r} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {asked!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {asked!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices; "
            "set LLM2VEC_DEVICE=cpu, or install a torch build and driver for your GPU"
        )
    return device


def choose_dtype(asked: Literal["auto", "bfloat16", "float32"], device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and on CPUs with bf16 instructions (AVX-512-bf16 or AMX), else float32."""
    if asked != "auto":
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32
