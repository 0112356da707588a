"""A stored encoder on a device: packed batches in, one vector a text out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from model_store.architectures import architecture_of
from model_store.encoder.attention import Kernel, choose_kernel, implementation_name
from model_store.encoder.cpu_linear import ROW_BLOCK, can_pack, pack_linears
from model_store.encoder.devices import DeviceError, Dtype, choose_device, choose_dtype
from model_store.encoder.head import Head
from model_store.encoder.int8 import quantize_int8, read_calibration
from model_store.encoder.merged_linear import merge_projections
from model_store.encoder.packing import PackedBatch, to_device
from model_store.encoder.pooling import pool
from model_store.encoder.quantization import Quantization, quantize_fp8
from model_store.rope import fix_frequencies

if TYPE_CHECKING:
    from model_store.manifest import Manifest

# T packed tokens, B texts, V vectors, D width of the decoder, W width of a vector

# A smaller batch gets a text of filler. Below 12 rows an AMD CPU's float32 matrix products take another path, and a
# short text alone would get other last bits (docs/fidelity.md). And a compiled layer must never see a single row. More
# filler than that would cost a lone query time.
LEAST_TOKENS = 12

# With a longest text of 1 the attention kernels assume decoding; a number above the true length costs nothing.
_LEAST_LONGEST = 8


@dataclass(frozen=True)
class Encoder:
    """A decoder on its device, ready to encode: `manifest` says how it attends and pools."""

    model: Any
    manifest: Manifest
    device: torch.device
    dtype: torch.dtype
    kernel: Kernel
    head: Head | None = None
    quantization: Quantization = "none"

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "auto",
        dtype: Dtype = "auto",
        attention: Kernel | Literal["auto"] = "auto",
        quantization: Quantization = "none",
    ) -> Encoder:
        """Load a stored encoder; its weights are in memory only once, and on a GPU they never are in the host's.

        Those that are to be quantised do pass through the host's memory: the GPU may have no room for them as they are.

        Raises:
            StoreError: if the folder is no stored encoder.
            DeviceError: if the device does not exist, or can't compute in the dtype.
            AttentionError: if the attention kernel asked for can't serve this model on this device.
            RopeError: if the folder's longest texts would make a text's RoPE depend on its batch mates.
            QuantizationError: if the device or the model does not allow the quantisation asked for.
        """
        from model_store.manifest import read_manifest  # needs pydantic, and an encoder made in memory does not

        manifest = read_manifest(folder)
        on = choose_device(device)
        as_dtype = choose_dtype(dtype, on, architecture_of(manifest.model_type).float16)
        disable_progress_bar()
        model = AutoModel.from_pretrained(
            folder,
            dtype=as_dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
            device_map=on if on.type == "cuda" and quantization == "none" else None,
        )
        largest_inputs = read_calibration(folder) if quantization == "int8" else {}
        return cls.of(model, manifest, on, attention, quantization, Head.read(folder), largest_inputs)

    @classmethod
    def of(
        cls,
        model: Any,
        manifest: Manifest,
        device: torch.device,
        attention: Kernel | Literal["auto"] = "auto",
        quantization: Quantization = "none",
        head: Head | None = None,
        largest_inputs: Mapping[str, Tensor] | None = None,
    ) -> Encoder:
        """An encoder of a bare decoder in memory; the decoder is changed in place and moved to the device.

        int8 goes by the `largest_inputs` of a calibration.

        Raises:
            AttentionError, RopeError, QuantizationError: as `load` does.
        """
        dtype = model.dtype
        kernel = choose_kernel(attention, device, dtype, model.config)
        model.config.is_causal = manifest.attention == "causal"
        model.set_attn_implementation(implementation_name(kernel))
        fix_frequencies(model, manifest.max_positions)
        # On a CPU gate and up stay apart: with packed weights (cpu_linear) the products apply the activation, and one
        # product for both took 6 to 21 % longer (AMD EPYC with AVX-512-bf16, 16 to 1024 tokens).
        merge_projections(model, device, gated=device.type == "cuda" or quantization == "int8")
        if quantization == "fp8":
            quantize_fp8(model, device)
        elif quantization == "int8":
            quantize_int8(model, device, largest_inputs or {})
        model.eval().requires_grad_(False).to(device)
        return cls(model, manifest, device, dtype, kernel, head and head.to(device), quantization)

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch) -> Tensor:
        """Token vectors, shape (T, D), in the encoder's dtype; they and `batch` are on the encoder's device."""
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
        """Text vectors, shape (B, W) float32 on the host, not normalised."""
        return self.vectors(self.place(batch))[: len(batch.cu_seqlens) - 1].cpu()

    def vectors(self, batch: PackedBatch) -> Tensor:
        """(V, W) float32 vectors of a batch on the encoder's device, not normalised."""
        return self.project(pool(self.hidden(batch), batch))

    def project(self, pooled: Tensor) -> Tensor:
        """(V, D) → (V, W): pooled vectors through the head, if the encoder has one."""
        return pooled if self.head is None else self.head(pooled)

    def place(self, batch: PackedBatch) -> PackedBatch:
        """A batch of the host, filled up and moved to where `hidden` and `pool` need it; waits for nothing."""
        filled = batch.filled_up_to(LEAST_TOKENS)
        tensors = filled.tensors
        # The loop over texts runs on the host, which would have to wait for the device to learn where texts begin.
        if self.kernel == "sdpa":
            del tensors["cu_seqlens"]
        return replace(filled, **to_device(tensors, self.device))  # type: ignore[arg-type]

    def pack_weights(self, equal_bits: bool = False) -> None:
        """On a CPU, reorder the linear layers' weights for its products; elsewhere do nothing.

        With `equal_bits`, products are taken over blocks of a fixed number of rows: see docs/fidelity.md.

        Raises:
            DeviceError: if equal bits are asked for and the device does not multiply packed weights of this dtype.
        """
        if can_pack(self.device, self.dtype):
            pack_linears(self.model, ROW_BLOCK if equal_bits else 0)
        elif equal_bits:
            raise DeviceError(
                f"equal bits (LLM2VEC_EQUAL_BITS) need a CPU and float32, or bfloat16 where the CPU has its "
                f"instructions, not {self.device} and {str(self.dtype).removeprefix('torch.')}: leave them out"
            )

    def compile_layers(self) -> None:
        """Compile each layer at its next use: layers of one kind share a graph for any number of tokens and texts.

        The first batch then takes up to half a minute, or seconds if torch's compile cache has the layers.
        """
        for layer in self.model.layers:
            layer.compile(dynamic=True, fullgraph=True)

    def uncompile_layers(self) -> None:
        """Undo `compile_layers`."""
        for layer in self.model.layers:
            layer._compiled_call_impl = None
