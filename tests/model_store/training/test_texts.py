"""Texts and triplets from files, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from model_store.training.texts import Example, Needs, TrainingDataError, read_contrastive, read_texts


def write(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "  one\n\n two \r\n"),
        ("texts.txt.gz", "one\n \ntwo"),
        ("texts.jsonl", '{"text": "one", "id": 7}\n\n{"text": "two"}\n{"text": " "}\n'),
        ("texts.jsonl.gz", '"one"\n"two"\n'),
        ("texts.json", '[{"text": "one"}, "two"]'),
        ("texts.json", '{"text": "one"}\n{"text": "two"}\n'),
        ("texts.json", '{"text": "one", "by": "a\u2028b"}\n{"text": "two"}\n'),
        *((name, "\ufeffone\ntwo\n") for name in ("texts.txt", "texts.txt.gz")),
        *((name, '\ufeff"one"\n"two"\n') for name in ("texts.jsonl", "texts.jsonl.gz")),
        ("texts.json", '\ufeff["one", "two"]'),
        ("texts.json.gz", '\ufeff{"text": "one"}\n{"text": "two"}\n'),
    ],
)
def test_texts_are_read(name: str, content: str, tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / name, content)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("texts.jsonl", '{"text": "one"}\n{"text": 2}\n', "line 2: a text must be a string, not int (2)"),
        ("texts.jsonl", '{"text": "one"}\n{"txt": "two"}\n', "line 2: there is no \"text\" among 'txt'"),
        ("texts.jsonl", '{"text": "one"}\n{"text": "two"\n', "line 2 is not valid JSON"),
        ("texts.json", '[{"text": "one"}, {"text": null}]', "item 2: a text must be a string, not nothing"),
        ("texts.json", "[1", "is not valid JSON"),
        ("texts.json", '"one"', "an array is needed"),
        ("texts.jsonl", '"one"\n{"text": "\\ud83d"}\n', "line 2 holds \\ud83d, half of a surrogate pair"),
        ("texts.json", '["one", {"text": "\\ude00"}]', "item 2 holds \\ude00, half of a surrogate pair"),
        ("texts.jsonl", '"one"\n' + "[" * 100_000 + "\n", "line 2 is not valid JSON"),
        ("texts.csv", "one", "is of no known kind: name it .txt, .json or .jsonl"),
        ("texts.gz", "one", "is of no known kind"),
    ],
)
def test_a_bad_text_is_named_by_file_and_line(name: str, content: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(TrainingDataError) as caught:
        read_texts(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="can't be read"):
        read_texts(tmp_path / "none.txt")
    for name, content, place in (
        ("latin.txt", b"one\ncaf\xe9\n", "line 2"),
        ("latin.jsonl", b'"one"\n"caf\xe9"\n', "line 2"),
        ("latin.json", b'["one", "caf\xe9"]', "item 2"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TrainingDataError, match=f"{name}, {place} is not valid UTF-8"):
            read_texts(tmp_path / name)
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"one\n" * 1000)[:-9])
    with pytest.raises(TrainingDataError, match="can't be read"):
        read_texts(tmp_path / "torn.txt.gz")


def test_examples_of_a_file(tmp_path: Path) -> None:
    """All positives and negatives are kept, by the names that the common layouts have for them."""
    rows = [
        {"query": "q", "positive": "p", "negative": "n", "label": 1},
        {"anchor": "q", "pos": ["p", "other"], "neg": ["n", "m"], "user_prompt": "Find it:"},
        {"query": "q", "positive": "p", "instruction": "Find it:", "passage_instruction": "Passage:", "neg": []},
        {"anchor": "q", "positive": "p", "negative_10": "c", "negative_1": "a", "negative_2": "b", "negative_3": None},
    ]
    path = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_contrastive(path) == [
        Example("q", ("p",), ("n",), group="pairs"),
        Example("q", ("p", "other"), ("n", "m"), "Find it:", group="pairs"),
        Example("q", ("p",), (), "Find it:", "Passage:", group="pairs"),
        Example("q", ("p",), ("a", "b", "c"), group="pairs"),
    ]


NEEDS = Needs(scores=True, negatives=True)


def test_scores_of_a_file(tmp_path: Path) -> None:
    """As sentence-transformers' losses and FlagEmbedding name them."""
    common = {"query": "q", "pos": ["p", "o"], "neg": ["n"]}
    rows = [
        {**common, "scores": [3, 2.5, -1]},
        {**common, "label": [3, 2.5, -1]},
        {**common, "pos_scores": [3, 2.5], "neg_scores": [-1]},
    ]
    path = write(tmp_path / "scored.jsonl", "\n".join(map(json.dumps, rows)))
    assert [each.scores for each in read_contrastive(path, needs=NEEDS)] == [(3.0, 2.5, -1.0)] * 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "there are no 'scores' among 'query', 'positive', 'negative', and distillation_loss needs a teacher's"),
        (
            {"scores": [1]},
            "scores has 1 numbers for 2 passages: give one for each positive, then one for each negative",
        ),
        ({"pos_scores": [1.0]}, "pos_scores has 1 numbers for 2 passages"),
        ({"label": 0.5}, "label must be a list of finite numbers, not float (0.5)"),
        ({"scores": [1, True]}, "scores must be a list of finite numbers"),
        ({"scores": [1, 10**400]}, "scores must be a list of finite numbers"),
        ({"scores": [1, 1e999]}, "scores must be a list of finite numbers"),
        ({"scores": [1], "negative": None}, "there is no negative, and distillation_loss compares passages of a query"),
    ],
)
def test_scores_that_are_none_are_named_by_line(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"query": "q", "positive": "p", "negative": "n", **change}))
    with pytest.raises(TrainingDataError) as caught:
        read_contrastive(path, needs=NEEDS)
    assert str(caught.value).startswith(f"{path}, line 1: {told}")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"query": "q"}', "line 2: there is no 'positive' among 'query'"),
        ('{"query": "q", "positive": ""}', "line 2: positive is empty"),
        ('{"query": "q", "positive": "p", "negative": 3}', "line 2: negative must be a string, not int (3)"),
        ('{"query": "q", "positive": []}', "line 2: positive must be a string, not nothing"),
        ('{"query": "q", "positive": ["p", " "]}', "line 2: positive is empty"),
        ('{"query": "q", "positive": "p", "negative": ["n", 3]}', "line 2: negative must be a string, not int (3)"),
        ('{"query": "q", "positive": "p", "negative_1": 3}', "line 2: negative_1 must be a string, not int (3)"),
        ('["q", "p"]', "line 2: an example must be an object"),
        ("{", "line 2 is not valid JSON"),
        ('{"query": "q", "positive": "p", "negative": "\\ud83d"}', "line 2 holds \\ud83d, half of a surrogate pair"),
        ('{"query": "q", "positive": "p", "instruction": "\\udfff"}', "line 2 holds \\udfff, half of a surrogate pair"),
    ],
)
def test_a_bad_triplet_is_named_by_file_and_line(row: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", f'{{"query": "q", "positive": "p"}}\n{row}\n')
    with pytest.raises(TrainingDataError) as caught:
        read_contrastive(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_is_a_group_a_file(tmp_path: Path) -> None:
    for name in ("nq", "fever"):
        write(tmp_path / f"{name}.jsonl", '{"query": "q", "positive": "p", "negative": "n"}\n' * 2)
    write(tmp_path / "zipped.json.gz", '\ufeff[{"query": "q", "positive": "p"}]')
    assert [each.group for each in read_contrastive(tmp_path)] == ["fever", "fever", "nq", "nq", "zipped"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingDataError, match=r"holds no \.jsonl file"):
        read_contrastive(tmp_path / "empty")


def test_e5_files_get_their_instructions(tmp_path: Path) -> None:
    own = '{"query": "q", "positive": "p", "negative": "n", "instruction": "My own:"}\n'
    for name in ("fever", "allnli", "other"):
        write(tmp_path / f"{name}.jsonl", '{"query": "q", "positive": "p", "negative": "n"}\n' * 2 + own)
    found = [(each.group, each.instruction, each.passage_instruction) for each in read_contrastive(tmp_path, e5=True)]
    claim = "Given a claim, retrieve documents that support or refute the claim;"
    assert found == [
        ("allnli", "Given a premise, retrieve a hypothesis that is entailed by the premise;", ""),
        ("allnli", "Retrieve semantically similar text;", ""),
        ("allnli", "My own:", ""),
        *[("fever", claim, "")] * 2,
        ("fever", "My own:", ""),
        *[("other", "", "")] * 2,
        ("other", "My own:", ""),
    ]
    assert {each.instruction for each in read_contrastive(tmp_path)} == {"", "My own:"}
