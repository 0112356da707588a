from __future__ import annotations

import pytest
from tokenizers import AddedToken, processors

from model_store.architectures import ARCHITECTURES
from model_store.templates import TEMPLATES, Template, template_for
from model_store.text.tokenizer import (
    ReferenceLimits,
    TextTokenizer,
    TokenizationError,
    TokenizedText,
    special_tokens_around,
)
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


@pytest.mark.parametrize("template", [Template(), Template("[INST] ", " [/INST]", strip=True)])
def test_a_row_says_that_reference_truncation_left_nothing_of_its_text(template: Template) -> None:
    rows = TextTokenizer(tiny_tokenizer(), template, True, VOCABULARY, ReferenceLimits(64, 20))
    ids = list(range(20, 60))
    texts: list[str | list[int]] = ["東京" * 30, "x" * 50, "the river " * 20, "a river", ids, "a river"]
    instructions = ["", INSTRUCTION, "", "", "", f"{INSTRUCTION} " * 3]
    emptied = [row.emptied for row in rows.encode_batch(texts, instructions)]
    assert emptied == [True, True, False, False, False, True]


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


AROUND = Template("[INST] ", " [/INST]", strip=True)


def test_a_row_knows_where_the_text_itself_is() -> None:
    tokenizer = text_tokenizer(AROUND)
    row = tokenizer.encode_batch([TEXT], [INSTRUCTION])[0]
    decode = tiny_tokenizer().decode
    assert decode(row.token_ids[row.head : len(row) - row.tail]).strip() in (TEXT, TEXT[1:])
    assert decode(row.token_ids[len(row) - row.tail :]) == " [/INST]"
    whole = text_tokenizer(AROUND, skip=False).encode_batch([TEXT], [INSTRUCTION])[0]
    assert (whole.head, whole.tail, whole.span_start) == (row.head, row.tail, 0)


def test_cutting_takes_from_the_text_alone() -> None:
    row = text_tokenizer(AROUND).encode_batch([TEXT * 5], [INSTRUCTION])[0]
    own = row.token_ids[row.head : len(row) - row.tail]
    for keep, kept in (("start", own[:7]), ("end", own[-7:])):
        cut = row.shortened(row.head + row.tail + 7, keep)  # type: ignore[arg-type]
        assert cut.token_ids == [*row.token_ids[: row.head], *kept, *row.token_ids[len(row) - row.tail :]]
        assert (cut.cut, cut.span_start) == (True, row.span_start)
    assert row.shortened(len(row)) is row
    with pytest.raises(ValueError, match="no room"):
        row.shortened(row.head + row.tail)


def test_chunks_are_the_text_again_each_with_all_around_it() -> None:
    row = text_tokenizer(AROUND).encode_batch([TEXT * 5], [INSTRUCTION])[0]
    most = row.head + row.tail + 9
    chunks = row.chunks(most)
    assert max(map(len, chunks)) == most
    own = [chunk.token_ids[row.head : len(chunk) - row.tail] for chunk in chunks]
    assert sum(own, []) == row.token_ids[row.head : len(row) - row.tail]  # noqa: RUF017
    assert {tuple(chunk.token_ids[: row.head]) for chunk in chunks} == {tuple(row.token_ids[: row.head])}
    assert not any(chunk.cut for chunk in chunks)
    assert row.chunks(len(row)) == [row]
    with pytest.raises(ValueError, match="no room"):
        row.chunks(row.head + row.tail)


def test_ids_are_as_good_as_the_text() -> None:
    """With the special tokens around them or without; beside texts in one batch."""
    tokenizer = text_tokenizer()
    text = tokenizer.encode_batch([TEXT], [""])[0]
    assert tokenizer.encode_batch([text.token_ids, "a", text.token_ids[1:]], [""] * 3)[::2] == [text, text]
    with_instruction = tokenizer.encode_batch([text.token_ids], [INSTRUCTION])[0]
    assert tiny_tokenizer().decode(with_instruction.token_ids) == f"{INSTRUCTION} {TEXT}"
    assert with_instruction.span_start == len(with_instruction) - len(text) + 1
    for wrong in (-1, VOCABULARY):
        with pytest.raises(TokenizationError, match=str(wrong)) as caught:
            tokenizer.encode_batch(["a", [3, wrong]], ["", ""])
        assert caught.value.index == 1


def test_ids_are_cut_as_the_reference_has_it() -> None:
    tokenizer = TextTokenizer(tiny_tokenizer(), Template(), True, VOCABULARY, ReferenceLimits(12, 5))
    row = tokenizer.encode_batch([list(range(20, 30))], [""])[0]
    assert row.token_ids[-5:] == list(range(20, 25))
    assert row.cut


@pytest.mark.parametrize("template", [Template(), AROUND])
def test_each_token_stands_for_its_characters(template: Template) -> None:
    tokenizer = text_tokenizer(template)
    text = "how much protein\na day – Größe"
    row, characters = tokenizer.locate(text, INSTRUCTION)
    assert row == tokenizer.encode_batch([text], [INSTRUCTION])[0]
    covered = {place for start, end in characters for place in range(start, end)}
    assert covered == set(range(len(text)))
    assert characters[0] == (0, 0)  # BOS
    own = characters[row.head + 1 : len(row) - row.tail]
    assert own == sorted(own)
    for token_id, (start, end) in zip(row.token_ids[row.head + 1 : len(row) - row.tail], own, strict=True):
        if text[start:end].isascii():
            assert tiny_tokenizer().decode([token_id]) == text[start:end]


@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("template", [Template(), AROUND, Template("", "<eos>", strip=True)])
def test_each_token_is_of_a_part(template: Template, instruction: str) -> None:
    tokenizer = text_tokenizer(template)
    row = tokenizer.encode_batch([TEXT], [instruction])[0]
    parts, texts = tokenizer.parts(row, instruction), tokenizer.token_texts(row.token_ids)

    def of(part: str, where: slice = slice(None)) -> str:
        pairs = list(zip(parts, texts, strict=True))[where]
        return "".join(text for own, text in pairs if own == part)

    assert "".join(texts) == "<bos>" + template.prefix + (instruction and f"{instruction} ") + TEXT + template.suffix
    assert of("special") == "<bos>"
    assert of("template", slice(row.head)).strip() == template.prefix.strip()
    assert of("instruction").strip() == instruction
    assert of("text").strip() == TEXT
    assert of("template", slice(row.head, None)) == template.suffix
    assert "text" in parts[row.span_start :]


def test_a_part_is_what_it_is_of_where_the_count_of_what_is_pooled_is_off() -> None:
    """Alone, a text may have more tokens than behind an instruction: then some of that is pooled."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(" mill", single_word=True)])
    rows = TextTokenizer(tokenizer, Template(), True, VOCABULARY + 1)
    row = rows.encode_batch(["mill"], ["Find:"])[0]
    parts = rows.parts(row, "Find:")
    assert [part for part in parts[row.span_start :] if part != "text"]
    assert parts[-1] == "text"
    assert rows.token_texts(row.token_ids)[-1] == " mill"
    assert parts.count("text") == 1


def test_some_of_a_character_s_bytes_have_no_text() -> None:
    tokenizer = text_tokenizer()
    row = tokenizer.encode_batch(["\N{SLIGHTLY SMILING FACE}"], [""])[0]
    assert "\ufffd" in tokenizer.token_texts(row.token_ids)[1]
    assert tokenizer.parts(row, "") == ["special", *["text"] * (len(row) - 1)]


def test_parts_of_token_ids_and_of_nothing() -> None:
    tokenizer = text_tokenizer(AROUND)
    row = tokenizer.encode_batch([[70, 71]], [INSTRUCTION])[0]
    found = tokenizer.parts(row, INSTRUCTION)
    assert found.count("text") == 2
    assert {"special", "template", "instruction", "text"} == set(found)
    assert set(tokenizer.parts(tokenizer.encode_nothing(), "")) == {"special", "template"}


def test_a_suffix_that_the_reference_cuts_off_is_none() -> None:
    uncut = text_tokenizer(AROUND).encode_batch(["the river"], [""])[0]
    for most in (len(uncut) - lost for lost in (0, 1, uncut.tail, uncut.tail + 1)):
        rows = TextTokenizer(tiny_tokenizer(), AROUND, True, VOCABULARY, ReferenceLimits(most, 400))
        row = rows.encode_batch(["the river"], [""])[0]
        whole = rows.locate("the river", "")[0]
        assert row.cut == (len(row) < len(whole))
        assert rows.parts(row, "") == rows.parts(whole, "")[: len(row)]


def test_nothing_has_a_row_too() -> None:
    assert text_tokenizer().encode_nothing().token_ids == [1]
    assert len(text_tokenizer(AROUND).encode_nothing()) > 1
    assert len(text_tokenizer(bos=False).encode_nothing()) > 0


@pytest.mark.parametrize("most", [4, 5, 7, 20, 100])
@pytest.mark.parametrize("own", [1, 2, 9, 60])
def test_chunks_are_counted_without_making_them(own: int, most: int) -> None:
    text = TokenizedText(list(range(3 + own)), 2, head=2, tail=1)
    assert text.chunk_tokens(most) == sum(map(len, text.chunks(most)))


def with_eos(template: Template = Template(), skip: bool = True, prompt: bool = False) -> TextTokenizer:  # noqa: B008
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return TextTokenizer(tokenizer, template, skip, VOCABULARY, span_count="prompt" if prompt else "text")


@pytest.mark.parametrize("prompt", [False, True])
def test_a_token_after_each_text_is_no_part_of_the_text_when_it_is_cut(prompt: bool) -> None:
    row = with_eos(prompt=prompt).encode_batch([TEXT], [""])[0]
    assert (row.head, row.tail) == (1, 1)
    own = row.token_ids[1:-1]
    chunks = row.chunks(7)
    assert [token for chunk in chunks for token in chunk.token_ids[1:-1]] == own
    assert all(chunk.token_ids[0] == 1 and chunk.token_ids[-1] == 2 for chunk in chunks)
    assert row.shortened(7, keep="end").token_ids == [1, *own[-5:], 2]


def test_a_span_counted_by_its_prompt() -> None:
    template = Template(lead="{instruction}", bare_lead="- ")
    tokenizer = with_eos(template, prompt=True)
    row = tokenizer.encode_batch([TEXT], ["find "])[0]
    lead = len(tiny_tokenizer().encode("find ", add_special_tokens=False).ids)
    assert (row.span_start, row.head, row.tail) == (1 + lead, 1 + lead, 1)
    assert tokenizer.locate(TEXT, "find ")[0] == row
    bare = tokenizer.encode_batch([TEXT], [""])[0]
    assert bare.span_start == 1 + len(tiny_tokenizer().encode("- ", add_special_tokens=False).ids)
    ids = tiny_tokenizer().encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode_batch([ids], ["find "])[0].span_start == 1 + lead
    assert with_eos(prompt=True).encode_batch([TEXT], [""])[0].span_start == 0
    assert with_eos(template, skip=False, prompt=True).encode_batch([TEXT], ["find "])[0].span_start == 0
    with pytest.raises(TokenizationError, match="no tokens"):
        tokenizer.encode_batch([""], ["find "])
    assert tokenizer.encode_nothing().token_ids == [1, *bare.token_ids[1 : bare.span_start], 2]
