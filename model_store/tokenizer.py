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
    """One row for the encoder. The tokens from `span_start` to the end are pooled: never none of them."""

    token_ids: list[int]
    span_start: int

    def __len__(self) -> int:
        return len(self.token_ids)


class TextTokenizer:
    """Turns (instruction, text) pairs into rows. Safe to call from several threads at once."""

    def __init__(self, tokenizer: Tokenizer, template: Template, skip_instruction: bool, vocabulary: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._skip_instruction = skip_instruction
        self._vocabulary = vocabulary

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> TextTokenizer:
        """The tokenizer of a stored encoder."""
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        return cls(tokenizer, manifest.template, manifest.skip_instruction, manifest.vocabulary)

    def encode_batch(self, texts: Sequence[str], instructions: Sequence[str]) -> list[TokenizedText]:
        """Rows for texts and their instructions ("" for none), in order; nothing is cut.

        The pooled span is counted, not located: it is as many tokens from the end as text + suffix has when
        tokenized alone without special tokens. Where a merge runs across the border of instruction and text
        that is a token or two off, and so are the official vectors.

        Raises:
            TokenizationError: if a text has no tokens, or one that the model has no embedding for.
        """
        bodies = [self._body(text) for text in texts]
        joined = [
            f"{instruction} {body}" if (instruction := given.strip()) else body
            for given, body in zip(instructions, bodies, strict=True)
        ]
        rows = self._encode([self._template.prefix + text for text in joined], special_tokens=True)
        if not self._skip_instruction:
            return [TokenizedText(row, 0) for row in rows]
        alone = self._encode(bodies, special_tokens=False)
        return [TokenizedText(row, max(len(row) - len(span), 0)) for row, span in zip(rows, alone, strict=True)]

    def _body(self, text: str) -> str:
        return (text.rstrip() if self._template.strip else text) + self._template.suffix

    def _encode(self, texts: list[str], special_tokens: bool) -> list[list[int]]:
        rows = [
            encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special_tokens)
        ]
        for index, row in enumerate(rows):
            if not row:
                raise TokenizationError("the text has no tokens", index)
            if max(row) >= self._vocabulary:
                token = self._tokenizer.id_to_token(max(row))
                raise TokenizationError(
                    f"the text contains {token!r}, which this model has no embedding for: remove it", index
                )
        return rows


def starts_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a special token before a text, which `bos_token` pooling needs."""
    with_special = tokenizer.encode("a", add_special_tokens=True).ids
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    return len(with_special) > len(alone) and with_special[0] != alone[0]
