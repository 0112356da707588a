from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_store.evaluation.classification import read_labelled
from model_store.evaluation.files import DatasetError, number_field, read_json_lines, read_lines, read_table, text_field
from model_store.evaluation.retrieval import read_collection
from model_store.evaluation.sts import read_pairs
from model_store.evaluation.words import read_conll


def test_lines_end_where_lines_end(tmp_path: Path) -> None:
    """Not at U+2028 or U+0085, which stand in real sentences."""
    content = "\ufeffone\r\ntwo\u2028and\u0085more\n\nfour\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.txt", "a.txt.gz"):
        assert read_lines(tmp_path / name) == ["one", "two\u2028and\u0085more", "", "four"]
    (tmp_path / "empty").write_text("")
    assert read_lines(tmp_path / "empty") == []


def test_what_is_no_text_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(b"not gzip")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a line\n" * 100)[:30])
    for name in ("a.gz", "cut.gz", "absent"):
        with pytest.raises(DatasetError, match=f"{name} can't be read"):
            read_lines(tmp_path / name)
    (tmp_path / "latin").write_bytes("plain\nGröße".encode("latin-1"))
    with pytest.raises(DatasetError, match="latin, line 2 is not valid UTF-8"):
        read_lines(tmp_path / "latin")


def test_json_lines_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_text('{"a": 1}\n{"a": }\n')
    with pytest.raises(DatasetError, match=r"line 2 is not valid JSON: Expecting value at column 7"):
        list(read_json_lines(path))
    for line in ("[" * 100_000, f'{{"a": {"9" * 5000}}}'):
        path.write_text(f'{{"a": 1}}\n{line}\n')
        with pytest.raises(DatasetError, match="line 2 is not valid JSON"):
            list(read_json_lines(path))
    path.write_text("[1]\n")
    with pytest.raises(DatasetError, match="line 1: not a JSON object"):
        list(read_json_lines(path))


def test_a_table_is_tsv_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"quoted\tyes\nplain\tno\tmore\n')
    (tmp_path / "a.jsonl").write_text('{"text": "\\"quoted", "label": "yes"}\n{"text": "plain", "label": "no"}\n')
    tables = [[row for _, row in read_table(tmp_path / name)] for name in ("a.tsv", "a.jsonl")]
    assert tables[0] == tables[1]


def test_fields_are_checked(tmp_path: Path) -> None:
    row = {"text": "a", "score": "4.5", "list": [1]}
    assert text_field(tmp_path, 1, row, "text") == "a"
    assert number_field(tmp_path, 1, row, "score") == 4.5
    with pytest.raises(DatasetError, match=r"line 7: there is no text 'list', it is \[1\]"):
        text_field(tmp_path, 7, row, "list")
    with pytest.raises(DatasetError, match="line 7: there is no text 'text', it is null"):
        text_field(tmp_path, 7, {"text": None}, "text")
    with pytest.raises(DatasetError, match="line 7: text is empty"):
        text_field(tmp_path, 7, {"text": " "}, "text")
    assert text_field(tmp_path, 7, {"text": ""}, "text", blank=True) == ""
    with pytest.raises(DatasetError, match="line 7: there is no 'rank', only"):
        number_field(tmp_path, 7, row, "rank")
    for value in ("a", [1], "nan", float("nan"), "-inf", float("inf"), 10**400, None):
        with pytest.raises(DatasetError, match=r"line 7: score is .*, not a number"):
            number_field(tmp_path, 7, {"score": value}, "score")


def read_one_document(path: Path) -> Any:
    """With a query, judged relevant."""
    (path.parent / "qrels").mkdir()
    (path.parent / "queries.jsonl").write_text('{"_id": "q", "text": "a"}\n')
    (path.parent / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return read_collection(path.parent)


# A reader, its file's name, and two good lines.
READERS: dict[str, tuple[Callable[[Path], Any], str, list[str]]] = {
    "pairs": (read_pairs, "a.jsonl", [f'{{"sentence1": "a", "sentence2": "b", "score": {n}}}' for n in (1, 2)]),
    "table": (read_labelled, "a.tsv", ["text\tlabel", "a\tyes"]),
    "labelled": (read_labelled, "a.jsonl", ['{"text": "a", "label": "yes"}', '{"text": "b", "label": 1}']),
    "corpus": (read_one_document, "corpus.jsonl", ['{"_id": "d", "text": "a"}', '{"_id": "e", "text": "b"}']),
    "words": (read_conll, "a.conll", ["the DET", "river NOUN"]),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path, reader: str) -> None:
    read, name, lines = READERS[reader]
    for mark in ("", "\ufeff"):
        path = tmp_path / f"{bool(mark)}" / name
        path.parent.mkdir()
        path.write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    assert read(tmp_path / "True" / name) == read(tmp_path / "False" / name)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_unicode_is_named_by_line(tmp_path: Path, reader: str) -> None:
    read, name, lines = READERS[reader]
    path = tmp_path / name
    path.write_bytes(f"{lines[0]}\n{lines[1]}\n".encode() + lines[1].encode().replace(b"b", b"\xff") + b"\xff\n")
    with pytest.raises(DatasetError, match=rf"{name}, line 3 is not valid UTF-8"):
        read(path)


@pytest.mark.parametrize("reader", [reader for reader in READERS if READERS[reader][1].endswith(".jsonl")])
def test_half_of_a_surrogate_pair_is_named_by_line(tmp_path: Path, reader: str) -> None:
    read, name, lines = READERS[reader]
    path = tmp_path / name
    path.write_text(lines[0] + "\n" + lines[1].replace('"b"', r'"\ud83d"') + "\n")
    with pytest.raises(DatasetError, match=rf"{name}, line 2 holds \\ud83d, half of a surrogate pair"):
        read(path)
