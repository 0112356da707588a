"""Pairs of plain texts: what each task makes, by chance but the same each time, and the command that writes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from model_store.training.text_pairs import INSTRUCTIONS, TextPairs
from model_store.training.texts import read_contrastive
from service.cli import main
from tests.model_store.training.runs import texts

SENTENCES = (
    "The river ran past the old mill.",
    'A man said: "The mill ground the corn!"',
    "Nobody in the valley knew why.",
    "But a plane was taking off from the field.",
)
PARAGRAPH = " ".join(SENTENCES)


def paragraphs(count: int) -> list[tuple[str, str | None]]:
    """Of four sentences each, all different."""
    return [
        (" ".join(f"{text.capitalize()} and paragraph {n} ends {k}." for k, text in enumerate(texts(4, n))), None)
        for n in range(count)
    ]


def test_a_sentence_finds_its_paragraph_which_keeps_it_by_chance() -> None:
    given = paragraphs(400)
    kept = 0
    for (text, _), pair in zip(given, TextPairs(["sentence"]).of(given), strict=True):
        query, positive = pair["query"], pair["positive"]
        assert pair["instruction"] == INSTRUCTIONS["sentence"]
        assert query in text
        assert query.endswith(".")
        if positive == text:
            kept += 1
        else:
            assert query not in positive
            assert " ".join(positive.split()) == " ".join(text.replace(query, " ").split())
    assert 20 < kept < 65  # 10 % of 400, give or take four standard deviations


@pytest.mark.parametrize(("keep", "found"), [(0.0, 0), (1.0, 50)])
def test_a_sentence_is_always_removed_or_never(keep: float, found: int) -> None:
    given = paragraphs(50)
    made = list(TextPairs(["sentence"], keep_sentence=keep).of(given))
    assert sum(pair["query"] in pair["positive"] for pair in made) == found


def test_sentences_end_where_a_reader_sees_it() -> None:
    queries = {pair["query"] for seed in range(40) for pair in TextPairs(["sentence"], seed).of([(PARAGRAPH, None)])}
    assert queries == set(SENTENCES)
    japanese = "今日はとても良い天気です。明日は雨が降るでしょう。"
    made = {pair["query"] for seed in range(20) for pair in TextPairs(["sentence"], seed).of([(japanese, None)])}
    assert made == {"今日はとても良い天気です。", "明日は雨が降るでしょう。"}


def test_crops_are_words_in_a_row_of_random_shares() -> None:
    text = " ".join(f"w{n}" for n in range(200))
    shares = []
    for seed in range(300):
        for pair in TextPairs(["crop"], seed).of([(text, None)]):
            assert pair["query"] in text
            assert pair["positive"] in text
            assert f" {pair['query']} " in f" {text} "  # whole words
            shares += [len(pair[side].split()) / 200 for side in ("query", "positive")]
    assert len(shares) == 600
    assert 0.04 < min(shares) < 0.07
    assert 0.48 < max(shares) <= 0.5


def test_a_title_finds_its_body_and_needs_no_length() -> None:
    rows = [(PARAGRAPH, "Mills"), (PARAGRAPH + " More.", None), ("Too short.", "Short"), (PARAGRAPH + " End.", " ")]
    assert list(TextPairs(["title"]).of(rows)) == [
        {"query": "Mills", "positive": PARAGRAPH, "instruction": INSTRUCTIONS["title"]}
    ]


def test_repeated_texts_and_ambiguous_queries_are_left_out() -> None:
    other = f"{PARAGRAPH} It was a day like any other."
    rows = [(PARAGRAPH, "Mills"), (f"  {PARAGRAPH.upper()}", "Again"), (other, "MILLS ")]
    made = TextPairs(["title"])
    assert [pair["positive"] for pair in made.of(rows)] == [PARAGRAPH]
    assert made.repeated == 2
    assert made.made == {"title": 1}


def test_the_seed_decides_and_an_instruction_may_be_the_user_s() -> None:
    given = paragraphs(20)
    tasks: list[Any] = ["sentence", "crop"]
    once, again, other = (list(TextPairs(tasks, seed).of(given)) for seed in (3, 3, 4))
    assert once == again != other
    assert {pair["instruction"] for pair in TextPairs(tasks, instruction="Find:").of(given)} == {"Find:"}
    assert not any("instruction" in pair for pair in TextPairs(tasks, instruction="").of(given))


def test_the_command_reads_the_formats_of_embed_and_training_reads_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text for text, _ in paragraphs(30)]
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("\n\n".join(given[:10]))
    (tmp_path / "b.csv").write_text("body\n" + "".join(f'"{text}"\n' for text in given[10:20]))
    rows = [{"text": text, "title": f"Title {n}"} for n, text in enumerate(given[20:])]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    files = [str(tmp_path / name) for name in ("a.txt.gz", "c.jsonl")]
    assert main(["pairs", *files, "--out", str(out), "--seed", "1"]) == 0
    examples = read_contrastive(out)
    assert [each.query for each in examples if each.instruction == INSTRUCTIONS["title"]] == [
        f"Title {n}" for n in range(10)
    ]
    assert {each.instruction for each in examples} == set(INSTRUCTIONS.values())
    assert capsys.readouterr().out.startswith(f"{out}: {len(examples)} pairs (20 of sentence, ")
    first = out.read_bytes()
    out.unlink()
    assert main(["pairs", *files, "--out", str(out), "--seed", "1"]) == 0
    assert out.read_bytes() == first
    command = ["pairs", str(tmp_path / "b.csv"), "--text-column", "body", "--task", "sentence"]
    assert main([*command, "--out", str(tmp_path / "b.jsonl")]) == 0
    assert len(read_contrastive(tmp_path / "b.jsonl")) == 10


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ('{"text": "a"}\n{"text": 3}\n', [], "in.jsonl, line 2: 'text' is int (3), not a string"),
        ('{"text": "Too short."}\n', [], "no pair can be made of {here}/in.jsonl: give longer texts"),
        ('{"text": "a"}\n', ["--out", "{here}/in.jsonl"], "in.jsonl is there already: choose another --out"),
    ],
)
def test_errors_name_the_file_and_leave_no_output(
    content: str, options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    command = ["pairs", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main(command + [option.format(here=tmp_path) for option in options]) == 1
    assert told.format(here=tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
