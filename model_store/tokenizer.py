"""Text and instruction → token ids and the span that is pooled, exactly as LLM2Vec does it. No torch here.

The checkpoint's tokenizer.json is used as it is: transformers rebuilds some tokenizers and changes their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from model_store.manifest import TOKENIZER_FILE, Manifest
from model_store.templates import Template


class TokenizationError(ValueError):
    """A text that the model cannot read; `index` is its place in the batch."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class TokenizedText:
    """One row for the encoder. The tokens from `span_start` to the end are pooled: never none of them.

    `cut` says that the text had more tokens than the row has room for, and lost some.
    """

    token_ids: list[int]
    span_start: int
    cut: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ReferenceLimits:
    """The official library's way of cutting: a text to `doc_max_length` tokens word by word, a row to `max_length`."""

    max_length: int
    doc_max_length: int


class TextTokenizer:
    """Turns (instruction, text) pairs into rows. Safe to call from several threads at once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        skip_instruction: bool,
        vocabulary: int,
        reference: ReferenceLimits | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._skip_instruction = skip_instruction
        self._vocabulary = vocabulary
        self._reference = reference
        self._before, self._after = special_tokens_around(tokenizer)

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, reference: bool = False) -> TextTokenizer:
        """The tokenizer of a stored encoder; with `reference` it cuts as the official library does, else never."""
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        limits = ReferenceLimits(manifest.max_length, manifest.doc_max_length) if reference else None
        return cls(tokenizer, manifest.template, manifest.skip_instruction, manifest.vocabulary, limits)

    def encode_batch(self, texts: Sequence[str], instructions: Sequence[str]) -> list[TokenizedText]:
        """Rows for texts and their instructions ("" for none), in order.

        The pooled span is counted, not located: it is as many tokens from the end as text + suffix has when
        tokenized alone without special tokens. Where a merge runs across the border of instruction and text
        that is a token or two off, and so are the official vectors.

        Raises:
            TokenizationError: if a text has no tokens, or one that the model has no embedding for.
        """
        kept = [self._shorten(text) for text in texts]
        bodies = [(text.rstrip() if self._template.strip else text) + self._template.suffix for text in kept]
        joined = [
            self._template.prefix + self._lead(instruction) + body
            for instruction, body in zip(instructions, bodies, strict=True)
        ]
        alone = self._ids(bodies)
        whole = alone if joined == bodies else self._ids(joined)
        return [
            self._row(index, ids, len(span), text != original)
            for index, (ids, span, text, original) in enumerate(zip(whole, alone, kept, texts, strict=True))
        ]

    def _lead(self, instruction: str) -> str:
        """An instruction and the space after it. One of white space alone is that space, unless the template strips."""
        if not instruction:
            return ""
        lead = f"{instruction.strip()} "
        return lead.lstrip() if self._template.strip else lead

    def _row(self, index: int, ids: list[int], pooled: int, cut: bool) -> TokenizedText:
        """A row of the joined text's `ids`, of which the last `pooled` are the text's own."""
        if self._reference:
            room = max(self._reference.max_length - len(self._before) - len(self._after), 0)
            cut = cut or len(ids) > room
            ids = ids[:room]
            pooled = min(pooled, self._reference.max_length)
        row = [*self._before, *ids, *self._after]
        if not row or not (pooled or cut):
            raise TokenizationError("the text has no tokens", index)
        if max(row) >= self._vocabulary:
            token = self._tokenizer.id_to_token(max(row))
            raise TokenizationError(
                f"the text contains {token!r}, which this model has no embedding for: remove it", index
            )
        # A text that was cut to nothing: the official library then pools the whole row.
        span_start = max(len(row) - pooled, 0) if self._skip_instruction and pooled else 0
        return TokenizedText(row, span_start, cut)

    def _shorten(self, text: str) -> str:
        """The official loop (llm2vec 0.2.3, `LLM2Vec._convert_to_str`): drop words until the text is short enough.

        A text without spaces is one word, and goes as a whole.
        """
        if self._reference is None:
            return text
        while True:
            tokens = min(len(self._ids([text])[0]), self._reference.max_length)
            if tokens <= self._reference.doc_max_length:
                return text
            words = text.split()
            text = " ".join(words[: int(len(words) * (self._reference.doc_max_length / tokens))])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text, such as BOS.

    Raises:
        ValueError: if it does anything else with special tokens.
    """
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    raise ValueError("the tokenizer's special tokens are not simply before and after a text: it can't be used")
