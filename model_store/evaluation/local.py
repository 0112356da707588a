"""Vectors from an encoder in this process, for evaluation: of texts under several poolings, and of words.

Texts are cut as the official library cuts them, so that scores can be compared with published ones. An LLM2Vec encoder
can also be evaluated at every stage of making it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model_store.architectures import Attention
from model_store.build.build import Progress, attention_of, build_encoder
from model_store.encoder.devices import Dtype
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.pooling import pool
from model_store.evaluation.files import DatasetError
from model_store.manifest import Role
from model_store.pooling_modes import PoolingMode
from model_store.recipe import Recipe
from model_store.text.prompts import EncoderPrompts
from model_store.text.tokenizer import TextTokenizer, TokenizedText

# D width

# A GPU needs large batches. On a CPU they only cost more.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class LocalEncoder:
    """An encoder and its tokenizer; texts are evaluated under each of `poolings`."""

    encoder: Encoder
    tokenizer: TextTokenizer
    poolings: tuple[PoolingMode, ...]
    batch_tokens: int

    @classmethod
    def load(
        cls,
        folder: Path,
        poolings: Sequence[PoolingMode] = (),
        device: str = "auto",
        dtype: Dtype = "auto",
    ) -> LocalEncoder:
        """Load a stored encoder. Without `poolings` it uses its own pooling.

        Raises:
            StoreError, DeviceError: as `Encoder.load`.
        """
        encoder = Encoder.load(folder, device, dtype)
        encoder.pack_weights()
        tokenizer = TextTokenizer.load(folder, encoder.manifest, reference=True)
        own = (encoder.manifest.pooling,)
        return cls(encoder, tokenizer, tuple(poolings) or own, _BATCH_TOKENS[encoder.device.type])

    @property
    def prompts(self) -> EncoderPrompts:
        """The encoder's prompts by name."""
        return EncoderPrompts.of(self.encoder.manifest)

    def embed(
        self, texts: Sequence[str], instruction: str | None = None, role: Role | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """(n, D) normalised vectors for each pooling, in the texts' order, from one forward pass.

        Without an `instruction` texts get the encoder's own for their `role`, or its default prompt.

        Raises:
            TokenizationError: for a text without tokens.
        """
        if instruction is None:
            instruction = self.encoder.manifest.instruction_of(role)
        rows = self.tokenizer.encode_batch(texts, [instruction] * len(texts))
        rows = [row.shortened(self.encoder.manifest.max_positions) for row in rows]
        width = self.encoder.manifest.width
        vectors: dict[str, NDArray[np.float32]] = {
            pooling: np.empty((len(rows), width), dtype=np.float32) for pooling in self.poolings
        }
        for places in _batches(rows, self.batch_tokens):
            packed = {pooling: self._pack([rows[place] for place in places], pooling) for pooling in self.poolings}
            hidden = self.encoder.hidden(next(iter(packed.values())))
            for pooling, batch in packed.items():
                pooled = torch.nn.functional.normalize(self.encoder.project(pool(hidden, batch))[: len(places)], dim=-1)
                vectors[pooling][places] = pooled.cpu().numpy()
        return vectors

    def embed_words(self, sentences: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float32]]:
        """(words, D) vectors of the words of all sentences, end to end, for `same_token` and for `next_token`.

        See `words` for the two. If no token comes before a word's first token, `next_token` leaves out that place, or
        uses the token itself if it is the word's only one. A sentence is read as its words with a space between them.

        Raises:
            DatasetError: for a sentence longer than the model reads, or a word that the tokenizer drops.
        """
        rows = [self._with_word_spans(words) for words in sentences]
        ends = np.cumsum([len(words) for words in sentences])
        shape = (int(ends[-1]), self.encoder.model.config.hidden_size)
        same, following = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
        for places in _batches(rows, self.batch_tokens):
            batch = self._pack([rows[place] for place in places], "mean")
            pooled = iter(pool(self.encoder.hidden(batch), batch).cpu().numpy())
            for place in places:
                count = len(sentences[place])
                there = slice(ends[place] - count, ends[place])
                same[there] = list(islice(pooled, count))
                following[there] = list(islice(pooled, count))
        return {"same_token": same, "next_token": following}

    def _with_word_spans(self, words: Sequence[str]) -> TokenizedText:
        """The row of a sentence. Its spans are the tokens of each word, and then those spans one position earlier."""
        text = " ".join(words)
        row, characters = self.tokenizer.locate(text, "")
        if len(row) > (most := self.encoder.manifest.max_positions):
            raise DatasetError(f"a sentence has {len(row)} tokens and the model reads {most}: leave out {text[:80]!r}")
        spans = []
        begin = 0
        for word in words:
            end = begin + len(word)
            # The space before a word belongs to the word, whether they share a token or the space has its own.
            own = [place for place, (start, stop) in enumerate(characters) if start < end and max(begin - 1, 0) < stop]
            if not own:
                raise DatasetError(f"the tokenizer has no token for {word!r} in {text[:80]!r}: leave the word out")
            spans.append((own[0], own[-1] + 1))
            begin = end + 1
        before = [(max(start - 1, 0), max(end - 1, 1)) for start, end in spans]
        return replace(row, spans=(*spans, *before))

    def _pack(self, rows: Sequence[TokenizedText], pooling: PoolingMode) -> PackedBatch:
        return self.encoder.place(PackedBatch.pack(rows, pooling))


def each_stage(
    recipe: Recipe, load: Callable[..., LocalEncoder], progress: Progress
) -> Iterator[tuple[str, Callable[[], LocalEncoder]]]:
    """(name, function that loads it) of each stage from a base to an encoder, in the order of BehnamGhader et al. 2024.

    First comes the base with causal attention, then with the encoder's own attention if that is another, then with one
    more adapter merged each time. Each encoder is built in a temporary folder at its turn, so disk and memory hold one
    at a time: a stage must be loaded before the next one is asked for. `load` is `LocalEncoder.load` with its options.

    Raises:
        ValueError: the errors of `build_encoder`.
    """
    attention = attention_of(recipe)
    stages: list[tuple[str, Attention, int]] = [("causal", "causal", 0)]
    stages += [("bidirectional", attention, 0)] if attention == "bidirectional" else []
    stages += [(name, attention, merged) for merged, name in enumerate(_stage_names(recipe.adapters), 1)]
    for name, direction, merged in stages:
        with tempfile.TemporaryDirectory(prefix="llm2vec-stage-") as scratch:
            folder = Path(scratch) / "encoder"
            stage = recipe.model_copy(update={"attention": direction, "adapters": recipe.adapters[:merged]})
            build_encoder(stage, folder, progress)
            yield name, partial(load, folder)


def _stage_names(adapters: tuple[str, ...]) -> list[str]:
    """The last part of each reference, or whole references if two last parts are the same."""
    short = [re.split("[/:]", reference.partition("@")[0].rstrip("/"))[-1] for reference in adapters]
    return [f"+ {name}" for name in (short if len(set(short)) == len(short) else adapters)]


def _batches(rows: Sequence[TokenizedText], most: int) -> Iterable[list[int]]:
    """Places of rows in batches of up to `most` tokens, the longest first, so that a lack of memory shows at once."""
    batches: list[list[int]] = []
    tokens = 0
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        if not batches or tokens + len(rows[place]) > most:
            batches.append([])
            tokens = 0
        batches[-1].append(place)
        tokens += len(rows[place])
    return tqdm(batches, unit="batch", disable=None, leave=False)
