"""Text and instruction → token ids and the pooled span, exactly as in LLM2Vec. No torch here.

The checkpoint's tokenizer.json is used as it is: transformers rebuilds some tokenizers and changes their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer

from model_store.errors import UserError
from model_store.templates import SpanCount, Template
from model_store.text.token_bounds import characters_per_token

if TYPE_CHECKING:
    from model_store.manifest import Manifest

# The part of a row that a token belongs to; special tokens and the template stand around every text.
Part = Literal["special", "template", "instruction", "text"]


class TokenizationError(UserError):
    """A text that the model cannot read; `index` is its place in the batch."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class TokenizerError(UserError):
    """A tokenizer that can't be used."""


@dataclass(frozen=True)
class TokenizedText:
    """One row for the encoder. The tokens from `span_start` to the end are pooled; there is at least one.

    `head` tokens (special ones, template, instruction) stand before the text's own tokens, and `tail` tokens after
    them. `cut` says that the text lost tokens because it had more than the row has room for, and `emptied` that it lost
    all of them. If there are `spans`, ranges of tokens, each of these is pooled to a vector instead.

    What cuts a row raises ValueError if it has no room for a token of the text.
    """

    token_ids: list[int]
    span_start: int
    cut: bool = False
    head: int = 0
    tail: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    emptied: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def vectors(self) -> int:
        """The number of vectors of this row."""
        return len(self.spans) or 1

    def room(self, most: int) -> int:
        """How many of the text's own tokens fit into a row of `most`; not positive if the others fill the row."""
        return most - self.head - self.tail

    def shortened(self, most: int, keep: Literal["start", "end"] = "start") -> TokenizedText:
        """The same row with at most `most` tokens: only the text's own are cut, and `keep` says which of them stay."""
        if len(self) <= most:
            return self
        room, end = self._chunk_starts(most).step, len(self) - self.tail
        kept = slice(self.head, self.head + room) if keep == "start" else slice(end - room, end)
        return self._of(self.token_ids[kept], cut=True)

    def chunks(self, most: int) -> list[TokenizedText]:
        """The text in rows of at most `most` tokens, all full but the last; each has all the tokens around the text."""
        if len(self) <= most:
            return [self]
        starts, end = self._chunk_starts(most), len(self) - self.tail
        return [self._of(self.token_ids[start : min(start + starts.step, end)], self.cut) for start in starts]

    def chunk_tokens(self, most: int) -> int:
        """The number of tokens in all `chunks` together, counted without making them."""
        if len(self) <= most:
            return len(self)
        around = self.head + self.tail
        own = len(self) - around
        return own + len(self._chunk_starts(most)) * around

    def _chunk_starts(self, most: int) -> range:
        room = self.room(most)
        if room < 1:
            raise ValueError(f"{self.head + self.tail} tokens around the text leave no room for it in {most}")
        return range(self.head, len(self) - self.tail, room)

    def _of(self, own: list[int], cut: bool) -> TokenizedText:
        ids = self.token_ids
        return replace(self, token_ids=[*ids[: self.head], *own, *ids[len(ids) - self.tail :]], cut=cut)


@dataclass(frozen=True)
class ReferenceLimits:
    """The official library cuts a text to `doc_max_length` tokens, word by word, and a row to `max_length` tokens."""

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
        span_count: SpanCount = "text",
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._skip_instruction = skip_instruction
        self._span_count = span_count
        self._vocabulary = vocabulary
        self._reference = reference
        self._before, self._after = special_tokens_around(tokenizer)
        # The number of tokens behind a text without and with an instruction.
        self._tail_tokens = [len(ids) for ids in self._ids([template.after_text(given) for given in ("", "x")])]
        # Also None if this tokenizer cuts texts, as no text is too long then.
        self.characters_per_token = None if reference else characters_per_token(tokenizer)

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, reference: bool = False) -> TextTokenizer:
        """The tokenizer of a stored encoder. With `reference` it cuts texts like the official library, else never."""
        from model_store.manifest import TOKENIZER_FILE  # needs pydantic, and rows alone do not

        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        limits = ReferenceLimits(manifest.max_length, manifest.doc_max_length) if reference else None
        template, vocabulary = manifest.template, manifest.vocabulary
        return cls(tokenizer, template, manifest.skip_instruction, vocabulary, limits, manifest.span_count)

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        """Rows for texts and their instructions ("" for none), in order.

        The pooled span is counted, not located: see `SpanCount`. If a merge runs across the border of instruction and
        text, the span is a token or two off; so it is in the official vectors.

        A text can also be given as this tokenizer's ids, with or without the special tokens around it.

        Raises:
            TokenizationError: if a text has no tokens, or a token that the model has no embedding for.
        """
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(texts):
            pairs = zip(texts, instructions, strict=True)
            return [self._encode_either(index, text, instruction) for index, (text, instruction) in enumerate(pairs)]
        kept = [self._shorten(text) for text in strings]
        leads = list(map(self._lead, instructions))
        bodies = list(map(self._body, kept, instructions))
        whole = self._ids([lead + body for lead, body in zip(leads, bodies, strict=True)])
        counts = self._counts(leads, bodies, whole)
        return [
            self._row(index, ids, count, given, text != original, emptied=bool(original) and not text)
            for index, (ids, count, given, text, original) in enumerate(
                zip(whole, counts, instructions, kept, strings, strict=True)
            )
        ]

    def encode_nothing(self) -> TokenizedText:
        """The row of an empty text: only the special tokens and the template, or a space if there are neither."""
        around = self._ids([self._lead("") + self._template.after_text("")])[0]
        row = [*self._before, *around, *self._after] or self._ids([" "])[0]
        tail = min(self._tail_tokens[0] + len(self._after), len(row))
        return TokenizedText(row, 0, head=len(row) - tail, tail=tail)

    def locate(self, text: str, instruction: str) -> tuple[TokenizedText, list[tuple[int, int]]]:
        """The row of a text, and for each of its tokens the range [start, end) of the text's characters.

        The range is empty for a token that stands for no character of the text. Nothing is cut.
        """
        lead, body = self._lead(instruction), self._body(text, instruction)
        encoding = self._tokenizer.encode(lead + body, add_special_tokens=False)
        own = self._counts([lead], [body], [encoding.ids])[0]
        row = self._row(0, encoding.ids, own, instruction, False, reference=False)
        ends = [(max(start - len(lead), 0), min(end - len(lead), len(text))) for start, end in encoding.offsets]
        characters = [(start, end) if start < end else (0, 0) for start, end in ends]
        return row, [*[(0, 0)] * len(self._before), *characters, *[(0, 0)] * len(self._after)]

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens in the vocabulary's spelling."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; U+FFFD stands for bytes that are only a part of a character."""
        return self._tokenizer.decode_batch([[token_id] for token_id in token_ids], skip_special_tokens=False)

    def parts(self, row: TokenizedText, instruction: str) -> list[Part]:
        """The part of each token of a row with this instruction; a token across a border belongs to the later part.

        The pooled tokens are not always those of the text: see `encode_batch`.
        """
        prefix, before = self._template.prefix, len(self._before)
        lead = self._tokenizer.encode(self._lead(instruction), add_special_tokens=False)
        text = before
        for ours, theirs in zip(lead.ids, row.token_ids[before:], strict=False):
            if ours != theirs:
                break
            text += 1
        own = before + sum(end <= len(prefix) for _, end in lead.offsets)
        suffix, after = len(row) - row.tail, len(row) - len(self._after)

        def part(place: int) -> Part:
            if not before <= place < after:
                return "special"
            if text <= place < suffix:
                return "text"
            return "instruction" if own <= place < text else "template"

        return list(map(part, range(len(row))))

    def special_tokens(self) -> frozenset[int]:
        """The ids of the tokens that stand for no text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Raises:
            TokenizationError: for an id that the model does not have.
        """
        self._check_ids(0, token_ids)
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def _lead(self, instruction: str) -> str:
        return self._template.prefix + self._template.before_text(instruction)

    def _body(self, text: str, instruction: str) -> str:
        return (text.rstrip() if self._template.strip else text) + self._template.after_text(instruction)

    def _counts(self, leads: list[str], bodies: list[str], whole: list[list[int]]) -> list[int]:
        """How many of each row's tokens are those of the text and of what stands behind it."""
        if not any(leads):
            return list(map(len, whole))
        if self._span_count == "text":
            return list(map(len, self._ids(bodies)))
        before = map(len, self._ids(leads))
        pairs = zip(whole, before, bodies, strict=True)
        return [max(len(ids) - lead, 1 if body else 0) for ids, lead, body in pairs]

    def _encode_either(self, index: int, text: str | Sequence[int], instruction: str) -> TokenizedText:
        if isinstance(text, str):
            try:
                return self.encode_batch([text], [instruction])[0]
            except TokenizationError as error:
                raise TokenizationError(str(error), index) from error
        self._check_ids(index, text)
        own = list(text)
        if self._before and own[: len(self._before)] == self._before:
            own = own[len(self._before) :]
        if self._after and own[-len(self._after) :] == self._after:
            own = own[: -len(self._after)]
        lead, tail = self._ids([self._lead(instruction), self._template.after_text(instruction)])
        kept = own[: self._reference.doc_max_length] if self._reference else own
        return self._row(index, [*lead, *kept, *tail], len(kept) + len(tail), instruction, cut=len(kept) < len(own))

    def _check_ids(self, index: int, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocabulary:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self._vocabulary)
            raise TokenizationError(f"there is no token {wrong}: this model's are 0 to {self._vocabulary - 1}", index)

    def _row(
        self,
        index: int,
        ids: list[int],
        own: int,
        instruction: str,
        cut: bool,
        reference: bool = True,
        emptied: bool = False,
    ) -> TokenizedText:
        """A row of the joined text's `ids`; the last `own` of them are those of the text and of what is behind it."""
        behind = self._tail_tokens[bool(instruction)]
        if self._reference and reference:
            room = max(self._reference.max_length - len(self._before) - len(self._after), 0)
            emptied = emptied or len(ids) - own >= room
            lost = max(len(ids) - room, 0)
            cut, behind = cut or lost > 0, max(behind - lost, 0)
            ids = ids[:room]
            own = min(own, self._reference.max_length)
        row = [*self._before, *ids, *self._after]
        if not row or not (own or cut):
            raise TokenizationError("the text has no tokens", index)
        if max(row) >= self._vocabulary:
            token = self._tokenizer.id_to_token(max(row))
            raise TokenizationError(
                f"the text contains {token!r}, which this model has no embedding for: remove it", index
            )
        head = min(max(len(row) - len(self._after) - own, 0), len(row) - 1)
        tail = min(behind + len(self._after), len(row) - 1 - head)
        return TokenizedText(row, self._span_start(len(row), head, own), cut, head, tail, emptied=emptied)

    def _span_start(self, length: int, head: int, own: int) -> int:
        # The official library pools the whole row of a text that was cut to nothing.
        if not self._skip_instruction or not own:
            return 0
        if self._span_count == "text":
            return max(length - own, 0)
        return head if head > len(self._before) else 0

    def _shorten(self, text: str) -> str:
        """The official loop (llm2vec 0.2.3, `LLM2Vec._convert_to_str`): drop words until the text is short enough.

        A text without spaces is one word, and is dropped as a whole: its row is then marked as emptied.
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
        TokenizerError: if it does anything else with special tokens.
    """
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    raise TokenizerError("the tokenizer's special tokens are not simply before and after a text: it can't be used")
