from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from model_store.evaluation.files import DatasetError, number_field, read_json_lines, read_lines, read_table, text_field


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
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    for name in ("a.gz", "cut.gz", "latin", "absent"):
        with pytest.raises(DatasetError, match=f"{name} can't be read"):
            read_lines(tmp_path / name)


def test_json_lines_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_text('{"a": 1}\n{"a": }\n')
    with pytest.raises(DatasetError, match=r"line 2: Expecting value at column 7"):
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
    with pytest.raises(DatasetError, match="line 7: there is no text 'list', only text, score, list"):
        text_field(tmp_path, 7, row, "list")
    with pytest.raises(DatasetError, match="line 7: text is empty"):
        text_field(tmp_path, 7, {"text": " "}, "text")
    assert text_field(tmp_path, 7, {"text": ""}, "text", blank=True) == ""
    with pytest.raises(DatasetError, match="line 7: there is no 'rank', only"):
        number_field(tmp_path, 7, row, "rank")
    for name in ("text", "list"):
        with pytest.raises(DatasetError, match="not a number"):
            number_field(tmp_path, 7, row, name)
