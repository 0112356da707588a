from __future__ import annotations

import pytest

from model_store.architectures import ARCHITECTURES
from model_store.templates import TEMPLATES, Template, template_for
from model_store.tokenizer import ReferenceLimits, TextTokenizer, TokenizationError, special_tokens_around
from tests.tiny import VOCABULARY, tiny_tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
TEXT = "how much protein a day"


def text_tokenizer(template: Template = Template(), skip: bool = True, bos: bool = True) -> TextTokenizer:  # noqa: B008
    return TextTokenizer(tiny_tokenizer(bos), template, skip, VOCABULARY)


def one(tokenizer: TextTokenizer, text: str, instruction: str = "") -> tuple[str, str]:
    """The row's text before the pooled span, and within it."""
    row = tokenizer.encode_batch([text], [instruction])[0]
    decode = tiny_tokenizer().decode
    return (
        decode(row.token_ids[: row.span_start], skip_special_tokens=False),
        decode(row.token_ids[row.span_start :], skip_special_tokens=False),
    )


def test_bos_and_instruction_are_not_pooled() -> None:
    assert one(text_tokenizer(), TEXT) == ("<bos>", TEXT)
    before, pooled = one(text_tokenizer(), TEXT, f"  {INSTRUCTION} ")
    assert before + pooled == f"<bos>{INSTRUCTION} {TEXT}"
    # Counted, not located: the text alone has no space before its first word, so the count may be off by one.
    assert pooled.strip() in (TEXT, TEXT[1:])


def test_template_suffix_is_pooled_and_prefix_is_not() -> None:
    template = Template("[INST] ", " [/INST]", strip=True)
    before, pooled = one(text_tokenizer(template), f"{TEXT}  ")
    assert before + pooled == f"<bos>[INST] {TEXT} [/INST]"
    assert pooled.endswith(" [/INST]")
    assert before.startswith("<bos>[INST]")


def test_strip_takes_trailing_but_not_leading_space_of_a_text() -> None:
    """The official strip() sees a separator before the text, so only the end goes."""
    template = Template("[INST] ", " [/INST]", strip=True)
    before, pooled = one(text_tokenizer(template), f"  {TEXT}  ")
    assert before + pooled == f"<bos>[INST]   {TEXT} [/INST]"
    assert "".join(one(text_tokenizer(), f"  {TEXT}  ")) == f"<bos>  {TEXT}  "


def test_without_skip_instruction_every_token_is_pooled() -> None:
    assert one(text_tokenizer(skip=False), TEXT, INSTRUCTION) == ("", f"<bos>{INSTRUCTION} {TEXT}")


def test_separator_strings_of_the_official_library_are_plain_text() -> None:
    assert one(text_tokenizer(), "a !@#$%^&*() day") == ("<bos>", "a !@#$%^&*() day")


def test_batches_keep_their_order() -> None:
    tokenizer = text_tokenizer()
    texts = [TEXT, "A plane is taking off.", "flute"]
    together = tokenizer.encode_batch(texts, ["", INSTRUCTION, ""])
    apart = [
        tokenizer.encode_batch([text], [given])[0] for text, given in zip(texts, ["", INSTRUCTION, ""], strict=True)
    ]
    assert together == apart


def test_a_token_without_an_embedding_is_an_error_not_a_crash() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["<image>"])
    small = TextTokenizer(tokenizer, Template(), True, VOCABULARY - 10)
    with pytest.raises(TokenizationError, match="<image>") as caught:
        small.encode_batch(["fine", "an <image>"], ["", ""])
    assert caught.value.index == 1


def test_special_tokens_around() -> None:
    assert special_tokens_around(tiny_tokenizer()) == ([1], [])
    assert special_tokens_around(tiny_tokenizer(bos=False)) == ([], [])


def reference_tokenizer(max_length: int, doc_max_length: int) -> TextTokenizer:
    return TextTokenizer(tiny_tokenizer(), Template(), True, VOCABULARY, ReferenceLimits(max_length, doc_max_length))


def test_reference_truncation_drops_words_then_cuts_the_row() -> None:
    text = "the river ran past the mill and the valley " * 4
    row = reference_tokenizer(64, 20).encode_batch([text], [""])[0]
    assert row.cut
    assert 1 < len(row.token_ids) <= 21
    row = reference_tokenizer(16, 400).encode_batch([text], [INSTRUCTION])[0]
    assert (len(row.token_ids), row.cut) == (16, True)
    assert row.token_ids[0] == 1
    row = reference_tokenizer(64, 20).encode_batch(["a river"], [""])[0]
    assert not row.cut


def test_reference_truncation_drops_a_long_word_whole_and_pools_what_is_left() -> None:
    row = reference_tokenizer(64, 5).encode_batch(["x" * 50], [""])[0]
    assert (row.token_ids, row.span_start, row.cut) == ([1], 0, True)


def test_nothing_is_cut_unasked() -> None:
    row = text_tokenizer().encode_batch(["x" * 5000], [""])[0]
    assert not row.cut
    assert len(row.token_ids) > 600


def test_templates_by_name_and_pooling() -> None:
    llama, gemma = ARCHITECTURES["llama"], ARCHITECTURES["gemma"]
    for name, template in TEMPLATES.items():
        assert template_for(name, "mean", llama) == template
    assert template_for("some/other", "mean", llama) == Template()
    assert template_for("some/other", "eos_token", llama) == Template("", " </s>", strip=True)
    assert template_for("some/other", "eos_token", gemma) == Template("", "<eos>", strip=True)
    assert template_for("meta-llama/Meta-Llama-3-8B", "eos_token", llama).suffix == "<|end_of_text|>"
    assert template_for("meta-llama/Meta-Llama-3-8B-Instruct", "eos_token", llama).suffix == "<|eot_id|>"
    assert template_for("meta-llama/Llama-2-7b-chat-hf", "eos_token", llama).suffix == " [/INST] </s>"
