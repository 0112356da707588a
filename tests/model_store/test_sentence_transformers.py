"""A stored encoder opened by the libraries people already use: the same vectors as the server's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TextTokenizer
from tests.tiny import build_tiny, normalized

TEXTS = ["A plane is taking off.", "the river", "Größe 東京 🙂 " * 9]
INSTRUCTION = "Find:"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "gemma3_text", query_instruction=INSTRUCTION)
    return folder


def ours(folder: Path, instruction: str = "") -> torch.Tensor:
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    rows = TextTokenizer.load(folder, encoder.manifest).encode_batch(TEXTS, [instruction] * len(TEXTS))
    return normalized(encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling)))


def test_sentence_transformers_opens_the_folder(encoder: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(
        str(encoder), device="cpu", trust_remote_code=True, model_kwargs={"dtype": "float32"}
    )
    model.max_seq_length = 40
    cut = model.encode(["the mill and the river " * 20])[0]
    assert np.abs(cut - model.encode(["the mill and the river " * 40])[0]).max() == 0
    model.max_seq_length = 512
    assert np.abs(cut - model.encode(["the mill and the river " * 20])[0]).max() > 1e-4
    for batch_size in (1, 32):
        plain = model.encode(TEXTS, batch_size=batch_size)
        assert np.abs(plain - ours(encoder).numpy()).max() < 1e-5
    for asked in (
        model.encode(TEXTS, prompt=INSTRUCTION),
        model.encode(TEXTS, prompt_name="query"),
        model.encode_query(TEXTS),
    ):
        assert np.abs(asked - ours(encoder, INSTRUCTION).numpy()).max() < 1e-5
    assert np.abs(model.encode_document(TEXTS) - ours(encoder).numpy()).max() < 1e-5
    assert model.get_embedding_dimension() == 64
    with pytest.raises(ValueError, match="copy the stored encoder"):
        model[0].save("anywhere")


def test_llama_index_opens_the_folder(encoder: Path) -> None:
    module = pytest.importorskip("llama_index.embeddings.huggingface", reason="llama-index is in the extra `dev`")
    model = module.HuggingFaceEmbedding(
        str(encoder),
        device="cpu",
        trust_remote_code=True,
        query_instruction=INSTRUCTION,
        text_instruction="",
        model_kwargs={"dtype": "float32"},
    )
    assert np.abs(np.array(model.get_text_embedding_batch(TEXTS)) - ours(encoder).numpy()).max() < 1e-5
    queries = np.array([model.get_query_embedding(text) for text in TEXTS])
    assert np.abs(queries - ours(encoder, INSTRUCTION).numpy()).max() < 1e-5
