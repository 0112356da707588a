"""A stored encoder as a module of sentence-transformers, so that programs for that library can open it as it is.

    SentenceTransformer(folder, trust_remote_code=True).encode(texts, prompt=instruction)

gives the server's vectors: the same rows, packed attention and pooling, normalised. A prompt is an instruction here:
placed as LLM2Vec places it and left out of pooling. sentence-transformers asks for `trust_remote_code` before it
imports any class but its own; what it imports is this file, from the installed package, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import InputModule
from torch import Tensor

from model_store.encoder.attention import choose_kernel, implementation_name
from model_store.encoder.encoder import LEAST_TOKENS, Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TextTokenizer


class StoredEncoderModule(InputModule):  # type: ignore[misc]
    """The one module of a stored encoder: text to normalised vectors."""

    def __init__(self, encoder: Encoder, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self.model = encoder.model
        self._manifest = encoder.manifest
        self._kernel = encoder.kernel
        self._head = encoder.head
        self._text_tokenizer = tokenizer
        self.max_seq_length = encoder.manifest.max_positions

    @classmethod
    def load(cls, model_name_or_path: str, *, model_kwargs: dict[str, Any] | None = None, **_: Any) -> Any:
        """Open a stored encoder's folder; `model_kwargs` may name a dtype.

        Raises:
            StoreError: if the folder is no stored encoder.
        """
        asked = model_kwargs or {}
        dtype = str(asked.get("dtype") or asked.get("torch_dtype") or "auto").removeprefix("torch.")
        folder = Path(model_name_or_path)
        encoder = Encoder.load(folder, device="cpu", dtype=dtype)  # type: ignore[arg-type]
        return cls(encoder, TextTokenizer.load(folder, encoder.manifest))

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Texts and the instruction they share, as the tensors of one packed batch."""
        rows = self._text_tokenizer.encode_batch(list(inputs), [prompt or ""] * len(inputs))
        rows = [row.shortened(self.max_seq_length) for row in rows]
        batch = PackedBatch.pack(rows, self._manifest.pooling).filled_up_to(LEAST_TOKENS)
        return {**vars(batch), "texts": len(rows)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, (B, D) float32, to the features of a packed batch."""
        batch = PackedBatch(**{name: features[name] for name in PackedBatch.__dataclass_fields__})
        encoder = self._on(batch.token_ids.device)
        vectors: Tensor = torch.nn.functional.normalize(encoder.vectors(batch)[: features["texts"]], dim=-1)
        return {**features, "sentence_embedding": vectors}

    def get_embedding_dimension(self) -> int:
        """D, the width of a vector."""
        return self._manifest.width

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Not offered: a stored encoder is built, not saved."""
        raise ValueError("copy the stored encoder's folder instead of saving it through sentence-transformers")

    def _on(self, device: torch.device) -> Encoder:
        """The encoder on the device to which sentence-transformers has moved the weights, with that device's kernel."""
        dtype = next(self.model.parameters()).dtype
        kernel = choose_kernel("auto", device, dtype, self.model.config)
        if kernel != self._kernel:
            self.model.set_attn_implementation(implementation_name(kernel))
            self._kernel = kernel
        return Encoder(self.model, self._manifest, device, dtype, kernel, self._head and self._head.to(device))
