"""Readers: what rows a file has, which are bad and why, and that each can be gone on with from any line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from service.bulk.reading import BadRow, Columns, Input, InputError, Kind, Row, find_inputs

COLUMNS = Columns("text", "id", ("n",))

# Everything that a text can hold, with what confuses readers of lines and of tables in it.
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\"',\t \u2028\x85\x00\ufeff"), max_size=30)
rows = st.lists(st.tuples(texts, texts, texts), max_size=12)
no_line_ends = str.maketrans("\r\n", "  ")


def write_jsonl(path: Path, found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    path.write_bytes(
        b"".join(json.dumps(dict(zip(("id", "text", "n"), row, strict=True))).encode() + b"\n" for row in found)
    )
    return found


def write_csv(path: Path, found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text", "n"), *found])
    return found


def write_tsv(path: Path, found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    flat = [tuple(value.translate(no_line_ends).replace("\t", " ") for value in row) for row in found]
    path.write_bytes("".join("\t".join(row) + "\n" for row in [("id", "text", "n"), *flat]).encode())
    return flat  # type: ignore[return-value]


def write_parquet(path: Path, found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    ids, own, numbers = zip(*found, strict=True) if found else ((), (), ())
    kind = pyarrow.string()
    table = pyarrow.table(
        {"id": pyarrow.array(ids, kind), "text": pyarrow.array(own, kind), "n": pyarrow.array(numbers, kind)}
    )
    parquet.write_table(table, path, row_group_size=5)
    return found


WRITERS: dict[Kind, Callable[[Path, list[tuple[str, str, str]]], list[tuple[str, str, str]]]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
@given(found=rows)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read_from_any_line_on(
    tmp_path: Path, kind: Kind, found: list[tuple[str, str, str]]
) -> None:
    path = tmp_path / f"rows.{kind}"
    written = WRITERS[kind](path, found)
    one = Input(path, kind)
    read = list(one.read(COLUMNS))
    assert [(row.values[0], row.text, row.values[1]) for row in read if isinstance(row, Row)] == written
    lines = [row.line for row in read]
    assert lines == sorted(set(lines))
    for place, line in enumerate(lines):
        assert list(one.read(COLUMNS, line)) == read[place + 1 :]


@given(found=st.lists(texts.map(lambda text: text.translate(no_line_ends)), max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_lines_are_split_at_line_ends_alone(tmp_path: Path, found: list[str]) -> None:
    for path, end in ((tmp_path / "a.txt", "\n"), (tmp_path / "b.txt.gz", "\r\n")):
        content = "".join(text + end for text in found).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        read = list(Input(path, "lines").read(Columns()))
        # A mark at the very beginning says that the file is UTF-8.
        expected = [found[0].removeprefix("\ufeff"), *found[1:]] if found else []
        assert [row.text for row in read if isinstance(row, Row)] == expected
        assert [row.line for row in read] == list(range(1, len(found) + 1))


BAD: list[tuple[Kind, bytes, int, str]] = [
    ("lines", b"good\n\xff\xfe\nalso good\n", 2, "not valid UTF-8: invalid start byte at byte 0"),
    ("jsonl", b'{"id": 1, "text": "a"}\n\n{"text": \n', 3, "not valid JSON: Expecting value"),
    ("jsonl", b'{"id": 1, "text": "a"}\n["text"]\n', 2, "not a JSON object"),
    ("jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "body": "b"}\n', 2, "there is no 'text', only 'id', 'body'"),
    ("jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "text": 17}\n', 2, "'text' is int (17), not a string"),
    ("jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "text": null}\n', 2, "'text' is null, not a string"),
    ("jsonl", b'{"id": 1, "text": "a"}\n{"text": "b"}\n', 2, "there is no 'id'"),
    ("jsonl", b'{"id": 1, "text": "a"}\n{"id": 2, "text": "\\ud800"}\n', 2, "'text' holds \\ud800, half of a"),
    ("jsonl", b'{"id": 1, "text": "a"}\n{"id": "\\udfff", "text": "b"}\n', 2, "'id' holds \\udfff, half of a"),
    ("jsonl", b'{"id": 1, "text": "a"}\n' + b"[" * 100_000 + b"\n", 2, "not valid JSON"),
    ("csv", b'id,text\n1,a\n2,"b\nc"\n3,d,e\n', 5, "has 3 columns, the header 2"),
    ("csv", b"id,text\n1,a\n2,\xe9\n", 3, "'text' is not valid UTF-8"),
    ("tsv", b'id\ttext\n1\t"a\n2\n', 3, "has 1 columns, the header 2"),
]


@pytest.mark.parametrize(("kind", "content", "line", "reason"), BAD)
def test_a_bad_row_has_its_line_and_its_reason(
    tmp_path: Path, kind: Kind, content: bytes, line: int, reason: str
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    bad = [
        row
        for row in Input(path, kind).read(Columns("text", None if kind == "lines" else "id"))
        if isinstance(row, BadRow)
    ]
    assert [row.line for row in bad] == [line]
    assert reason in bad[0].reason


def test_values_that_are_no_strings_are_carried_as_json_and_those_of_parquet_as_they_are(tmp_path: Path) -> None:
    values = [17, 1.5, None, True, {"a": [1]}, "words", "Größe"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": "t", "n": value}) + "\n" for n, value in enumerate(values)))
    read = [row.values for row in Input(path, "jsonl").read(COLUMNS) if isinstance(row, Row)]
    expected = ["17", "1.5", None, "true", '{"a": [1]}', "words", "Größe"]
    assert read == [(str(n), value) for n, value in enumerate(expected)]

    typed = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "id": [1, 2], "n": [1.5, None]}), typed)
    assert list(Input(typed, "parquet").read(COLUMNS)) == [Row(1, "a", (1, 1.5)), Row(2, "b", (2, None))]


def test_a_null_in_parquet_and_bytes_that_are_no_text_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    invalid = pyarrow.array([b"good", b"\xff", None]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": invalid}), path)
    good, invalid_row, null = Input(path, "parquet").read(Columns())
    assert good == Row(1, "good")
    assert isinstance(invalid_row, BadRow)
    assert "not valid UTF-8" in invalid_row.reason
    assert null == BadRow(3, "'text' is null, not a string")


def test_a_line_that_does_not_end_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a\n" + b"x" * 5500 + b"\nb\n" + b"y" * 999 + b"\n" + b"z" * 3000)
    read = list(Input(path, "lines", most_bytes=1000).read(Columns()))
    assert [type(row) for row in read] == [Row, BadRow, Row, Row, BadRow]
    assert [row.line for row in read] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('1,"never closed\n2,b\n3,c\n', 2),
        ('1,a\n2,"b\nb"\n3,"never closed', 5),
        ('1,"never closed\n2,"b"\n3,c\n', 2),
        ('1,a\n2,"5" screw"\n3,c\n', 3),
        ('1,a\n2,"b" \n3,c\n', 3),
        ('1,"never closed\n' + "2,more\n" * 1000, 2),
    ],
)
def test_a_quote_that_swallows_rows_names_the_line_it_is_in(tmp_path: Path, rows: str, line: int) -> None:
    for path in (tmp_path / "rows.csv", tmp_path / "rows.csv.gz"):
        content = f"id,text\n{rows}".encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        with pytest.raises(InputError, match=rf"{path.name}, line {line}: a quote in the row that begins here"):
            list(Input(path, "csv", most_bytes=1000).read(Columns()))


def test_a_field_that_is_too_long_has_no_quote_to_blame_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("id\ttext\n1\ta\n2\t" + "b" * 2000 + "\n")
    with pytest.raises(InputError, match=r"rows\.tsv, line 3: field larger than field limit \(1000\)$"):
        list(Input(tmp_path / "rows.tsv", "tsv", most_bytes=1000).read(Columns()))


def test_quotes_that_enclose_nothing_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,a 5" screw\n2,"a 5"" screw"\n')
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"a 5" screw\n2\t"b\n')
    for name, texts in (("a.csv", ['a 5" screw'] * 2), ("a.tsv", ['"a 5" screw', '"b'])):
        (one,) = find_inputs([tmp_path / name])
        assert [row.text for row in one.read(Columns()) if isinstance(row, Row)] == texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]),
        ("rows.jsonl.gz", b"not gzip"),
        ("rows.parquet", b"not parquet"),
    ],
)
def test_a_file_that_breaks_off_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (one,) = find_inputs([path])
    with pytest.raises(InputError, match=rf"{name} can't be read"):
        list(one.read(Columns()))


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}")


def test_a_folder_of_texts_is_one_input_in_order_of_their_paths(tmp_path: Path) -> None:
    make_files(tmp_path, "b.txt", "a/2.txt", "a/10.txt", ".hidden.txt", ".git/c.txt")
    (one,) = find_inputs([tmp_path])
    read = list(one.read(Columns("text", "path")))
    assert [row.values for row in read if isinstance(row, Row)] == [("a/10.txt",), ("a/2.txt",), ("b.txt",)]
    assert next(row.text for row in read if isinstance(row, Row)) == "the text of a/10.txt"
    assert one.where(3) == str(tmp_path / "b.txt")
    assert list(one.read(Columns("text", "path"), 2)) == read[2:]


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_folder_leaves_no_text_out_without_a_word(tmp_path: Path, target: str) -> None:
    """A link to a folder is not followed, as it may lead back; one to a file is read."""
    make_files(tmp_path, "in/a.txt", "elsewhere/b.txt")
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (one,) = find_inputs([tmp_path / "in"])
    assert len(list(one.read(Columns()))) == 2
    (tmp_path / "in" / "link").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"in/link is no file, and links to folders are not followed"):
        find_inputs([tmp_path / "in"])


def test_a_folder_of_tables_is_each_of_them(tmp_path: Path) -> None:
    make_files(tmp_path, "2.jsonl", "1.csv.gz", "3.parquet")
    assert find_inputs([tmp_path]) == [
        Input(tmp_path / "1.csv.gz", "csv"),
        Input(tmp_path / "2.jsonl", "jsonl"),
        Input(tmp_path / "3.parquet", "parquet"),
    ]
    assert [one.kind for one in find_inputs([tmp_path], "lines")] == ["lines"] * 3
    assert find_inputs([tmp_path], "files") == [Input(tmp_path, "files")]


@pytest.mark.parametrize(
    ("files", "asked", "message"),
    [
        (["a.bin"], ["a.bin"], "its name does not say what it is .* --input-format"),
        (["a.parquet.gz"], ["a.parquet.gz"], "does not say what it is"),
        ([], ["a.txt"], "a.txt is not there"),
        (["in/a.txt", "in/b.csv"], ["in"], "holds texts, such as a.txt, and tables, such as b.csv"),
        (["a.txt"], ["a.txt", "./a.txt"], "is given twice"),
        (["in/.hidden"], ["in"], "in holds no files"),
    ],
)
def test_inputs_that_make_no_sense(tmp_path: Path, files: list[str], asked: list[str], message: str) -> None:
    make_files(tmp_path, *files)
    with pytest.raises(InputError, match=message):
        find_inputs([tmp_path / name for name in asked])


def test_a_name_says_the_kind_in_any_case(tmp_path: Path) -> None:
    make_files(tmp_path, "A.JSONL.gz", "b.ndjson", "c.TXT")
    assert [one.kind for one in find_inputs(sorted(tmp_path.iterdir()))] == ["jsonl", "jsonl", "lines"]


def test_names_and_types(tmp_path: Path) -> None:
    table: dict[str, Any] = {"text": ["a"], "id": pyarrow.array(["x"]).dictionary_encode(), "n": [1]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("\ufefftext,id\n")
    stored, table_ = find_inputs([tmp_path])
    assert stored.names(Columns()) == ["text", "id", "n"]
    assert [str(stored.type_of(name)) for name in ("id", "n")] == ["string", "int64"]
    assert table_.names(Columns()) == ["text", "id"]
    assert table_.type_of("id") is None
