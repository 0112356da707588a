"""Whole jobs over a stand-in for the encoder: what they write, what they refuse, and how they go on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import dataset, parquet

from service.bulk.folder import JobFolder
from service.bulk.job import FileFormat, JobError
from service.bulk.pipeline import SIZES, Embedded, Window, embedded, reason_of, requests_of, take_windows
from service.bulk.reading import BadRow, Columns, Input, InputError, Row
from service.errors import ContextLengthExceeded, InvalidRequest, Unavailable
from tests.service.bulk.fakes import REFUSED, SMALL, WIDTH, FakeVectors, do_job, expected
from tests.service.bulk.output import read_output

ROOT = Path(__file__).parents[3]

COLUMNS = Columns("text", "id", ("n",))


def write_rows(path: Path, texts: list[str]) -> Input:
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    return Input(path, "jsonl")


def some_texts(count: int) -> list[str]:
    return [f"text {number} " + "of some length " * (number % 7) for number in range(count)]


def vectors_of(texts: list[str]) -> Any:
    return np.stack([expected(text) for text in texts])


@pytest.mark.parametrize("file_format", ["parquet", "safetensors"])
def test_every_row_gets_its_vector_in_order(tmp_path: Path, file_format: FileFormat) -> None:
    texts = some_texts(95)
    one, two = write_rows(tmp_path / "a.jsonl", texts[:33]), write_rows(tmp_path / "b.jsonl", texts[33:])
    vectors = FakeVectors(most_seconds=0.002)
    manifest = do_job([one, two], tmp_path / "out", vectors, COLUMNS, file_format=file_format)
    out = read_output(tmp_path / "out")
    assert out.rows == list(range(95))
    np.testing.assert_array_equal(out.vectors, vectors_of(texts))
    numbers = [*range(33), *range(62)]
    assert out.columns == {"id": [f"d{n}" for n in numbers], "n": [str(n) for n in numbers]}
    assert manifest.complete
    assert [shard.rows for shard in manifest.shards] == [10] * 9 + [5]
    assert sum(shard.tokens for shard in manifest.shards) == sum(map(len, texts))
    if file_format == "parquet":  # as docs/bulk.md has it
        table = dataset.dataset(tmp_path / "out", format="parquet", exclude_invalid_files=True).to_table()
        assert table["row"].to_pylist() == out.rows
    assert vectors.most_at_once == vectors.requests_at_once
    assert sorted(text for request in vectors.requests for text in request) == sorted(texts)


def test_a_job_that_is_done_asks_for_nothing_more(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", some_texts(12))
    first = do_job([one], tmp_path / "out", FakeVectors())
    again = FakeVectors()
    assert do_job([one], tmp_path / "out", again) == first
    assert again.requests == []


def test_rows_that_get_no_vector_are_left_out_and_listed(tmp_path: Path) -> None:
    texts = some_texts(40)
    for place in (3, 4, 17, 39):
        texts[place] = REFUSED
    one = write_rows(tmp_path / "a.jsonl", texts)
    with one.path.open("a") as file:
        file.write("not JSON\n")
    manifest = do_job([one], tmp_path / "out", FakeVectors(), on_error="skip")
    out = read_output(tmp_path / "out")
    good = [number for number, text in enumerate(texts) if text != REFUSED]
    assert out.rows == good
    np.testing.assert_array_equal(out.vectors, vectors_of([texts[number] for number in good]))
    assert [(error["row"], error["line"]) for error in out.errors] == [(n, n + 1) for n in (3, 4, 17, 39, 40)]
    assert {error["file"] for error in out.errors} == {str(one.path)}
    assert [error["reason"] for error in out.errors[:4]] == ["it is refused"] * 4
    assert "not valid JSON" in out.errors[4]["reason"]
    assert (manifest.rows, manifest.errors, manifest.read) == (36, 5, 41)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (str(ContextLengthExceeded(512, 600, 0)), "512 tokens, however you requested 600 tokens."),
        ("the input at index 0 is empty: leave it out", "the input is empty: leave it out"),
        ("the text of index 0 has 9 characters", "the text has 9 characters"),
        ("the instruction of input index 0 leaves no room", "the instruction leaves no room"),
        ("input index 0: it has no tokens", "input: it has no tokens"),
    ],
)
def test_a_reason_does_not_number_the_texts_of_a_request(message: str, reason: str) -> None:
    assert reason_of(InvalidRequest(message)).endswith(reason)


def test_a_shard_of_which_no_row_is_left_is_there_and_empty(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [REFUSED] * 10 + some_texts(3))
    do_job([one], tmp_path / "out", FakeVectors(), COLUMNS, on_error="skip")
    assert parquet.read_table(tmp_path / "out" / "part-00000.parquet").num_rows == 0
    assert read_output(tmp_path / "out").rows == [10, 11, 12]


def test_a_job_stops_at_a_bad_row_and_goes_on_without_it(tmp_path: Path) -> None:
    texts = some_texts(40)
    texts[25] = REFUSED
    one = write_rows(tmp_path / "a.jsonl", texts)
    with pytest.raises(InputError, match=r"a.jsonl, line 26: it is refused\. Mend it, or give --on-error skip"):
        do_job([one], tmp_path / "out", FakeVectors())
    assert read_output(tmp_path / "out").rows == list(range(20))
    vectors = FakeVectors()
    do_job([one], tmp_path / "out", vectors, on_error="skip")
    assert read_output(tmp_path / "out").rows == [n for n in range(40) if n != 25]
    assert not {text for request in vectors.requests for text in request} & set(texts[:20])


def test_a_row_that_can_be_seen_to_be_bad_stops_the_job_before_anything_is_computed(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", some_texts(40))
    with one.path.open("a") as file:
        file.write('{"id": "d40", "n": 40}\n')
    vectors = FakeVectors()
    with pytest.raises(InputError, match=r"a.jsonl, line 41: there is no 'text', only 'id', 'n'"):
        do_job([one], tmp_path / "out", vectors)
    assert vectors.requests == []


def test_an_encoder_that_is_lost_leaves_what_was_done(tmp_path: Path) -> None:
    texts = some_texts(60)
    one = write_rows(tmp_path / "a.jsonl", texts)
    with pytest.raises(Unavailable, match="the device is gone"):
        do_job([one], tmp_path / "out", FakeVectors(fails_after=12))
    done = len(read_output(tmp_path / "out").rows)
    assert 0 < done < 60
    do_job([one], tmp_path / "out", FakeVectors())
    out = read_output(tmp_path / "out")
    assert out.rows == list(range(60))
    np.testing.assert_array_equal(out.vectors, vectors_of(texts))


def test_killed_at_each_step_it_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    """A job is killed before its first change of the folder, before its second, and so on to its end."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.service.bulk.killed", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    points = int(ran.stdout)
    assert points > 20
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    good = [number for number, text in enumerate(texts) if text != REFUSED]
    for point in range(points):
        out = read_output(tmp_path / f"out-{point}")
        assert out.rows == good, point
        assert out.columns["n"] == [str(number) for number in good], point
        assert [error["row"] for error in out.errors] == [n for n in range(len(texts)) if n not in good], point
        np.testing.assert_array_equal(out.vectors, vectors_of([texts[number] for number in good]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_shard": 20}, "rows_per_shard 10, not 20"),
        ({"columns": Columns("text", "id")}, "id_column None, not 'id'"),
        ({"columns": Columns("text", None, ("n",))}, r"carried \(\), not \('n',\)"),
        ({"file_format": "safetensors"}, "file_format 'parquet', not 'safetensors'"),
        ({"vectors": FakeVectors(space="other")}, "embedding_space 'fake', not 'other'"),
    ],
)
@pytest.mark.parametrize("is_done", [False, True])
def test_another_job_is_refused_in_the_same_folder(
    tmp_path: Path, changes: dict[str, Any], message: str, is_done: bool
) -> None:
    one = write_rows(tmp_path / "a.jsonl", some_texts(40))
    first = FakeVectors(fails_after=float("inf") if is_done else 8)
    try:
        do_job([one], tmp_path / "out", first)
    except Unavailable:
        assert not is_done
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    arguments = {"vectors": FakeVectors(), **changes}
    with pytest.raises(JobError, match=message) as refused:
        do_job([one], tmp_path / "out", **arguments)
    assert "or begin anew with --overwrite" in str(refused.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_inputs_that_changed_are_refused_and_those_that_only_moved_are_not(tmp_path: Path) -> None:
    texts = some_texts(25)
    one = write_rows(tmp_path / "a.jsonl", texts)
    with pytest.raises(Unavailable):
        do_job([one], tmp_path / "out", FakeVectors(fails_after=6))
    write_rows(tmp_path / "a.jsonl", [*texts[:-1], "another text"])
    with pytest.raises(JobError, match=r"was begun with another .*a\.jsonl"):
        do_job([one], tmp_path / "out", FakeVectors())
    with pytest.raises(JobError, match="was begun with 1 inputs, not 2"):
        do_job([one, write_rows(tmp_path / "b.jsonl", ["b"])], tmp_path / "out", FakeVectors())
    do_job([write_rows(tmp_path / "moved.jsonl", texts)], tmp_path / "out", FakeVectors())
    assert read_output(tmp_path / "out").rows == list(range(25))


def test_an_input_that_is_written_to_meanwhile_is_not_taken_for_whole(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", some_texts(40))

    class Writes(FakeVectors):
        async def embed(self, texts: Sequence[str]) -> Embedded:
            with one.path.open("a") as file:
                file.write('{"text": "one more"}\n')
            return await super().embed(texts)

    with pytest.raises(JobError, match=r"a.jsonl was changed while it was embedded: begin anew with --overwrite"):
        do_job([one], tmp_path / "out", Writes())
    with pytest.raises(JobError, match="was begun with another"):
        do_job([one], tmp_path / "out", FakeVectors())


def test_overwriting_leaves_nothing_of_the_job_before(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [*some_texts(40), REFUSED])
    do_job([one], tmp_path / "out", FakeVectors(), COLUMNS, on_error="skip", file_format="safetensors")
    (tmp_path / "out" / "notes.md").write_text("mine")
    two = write_rows(tmp_path / "b.jsonl", ["only this"])
    do_job([two], tmp_path / "out", FakeVectors(), overwrite=True)
    (tmp_path / "out" / "notes.md").unlink()
    assert read_output(tmp_path / "out").rows == [0]
    assert read_output(tmp_path / "out").errors == []
    assert sorted(path.name for path in (tmp_path / "out").glob("part-*")) == ["part-00000.parquet"]


def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", ["a"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-00000.parquet").write_text("somebody's")
    for overwrite in (False, True):
        with pytest.raises(JobError, match=r"is not empty \(part-00000.parquet\) and has no manifest.json"):
            do_job([one], out, FakeVectors(), overwrite=overwrite)
    (out / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(JobError, match="is not the manifest of such a job"):
        do_job([one], out, FakeVectors(), overwrite=True)
    assert (out / "part-00000.parquet").read_text() == "somebody's"


def test_a_shard_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [*some_texts(20), REFUSED])
    do_job([one], tmp_path / "out", FakeVectors(), on_error="skip")
    (tmp_path / "out" / "errors.jsonl").write_text("")
    with pytest.raises(JobError, match=r"errors.jsonl is not as it was written: begin anew with --overwrite"):
        do_job([one], tmp_path / "out", FakeVectors(), on_error="skip")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    with pytest.raises(JobError, match=r"part-00001.parquet is not as it was written: begin anew with --overwrite"):
        do_job([one], tmp_path / "out", FakeVectors(), on_error="skip")


def test_two_jobs_at_once_never_write_to_one_folder(tmp_path: Path) -> None:
    with (
        JobFolder.alone(tmp_path / "out"),
        pytest.raises(JobError, match="another job is writing to"),
        JobFolder.alone(tmp_path / "out"),
    ):
        pass
    with JobFolder.alone(tmp_path / "out") as folder:
        assert folder.manifest is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("body"), r"a\.csv has no column 'body', only 'text', 'n', 'n'"),
        (Columns("text", "key"), "has no column 'key'"),
        (Columns("text", None, ("n",)), "has 2 columns 'n'"),
        (Columns("text", None, ("embedding",)), "the output has a column 'embedding' of its own"),
        (Columns("text", None, ("text", "text")), "the column 'text' is to be carried twice"),
    ],
)
def test_columns_that_are_not_there_stop_the_job_before_it_begins(
    tmp_path: Path, columns: Columns, message: str
) -> None:
    (tmp_path / "a.csv").write_text("text,n,n\nwords,1,2\n")
    with pytest.raises(InputError, match=message):
        do_job([Input(tmp_path / "a.csv", "csv")], tmp_path / "out", FakeVectors(), columns)


def test_a_column_to_carry_that_no_row_has_is_a_mistake_and_one_that_some_have_is_null_elsewhere(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": 1}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"no row of .*a.jsonl has a column 'm'"):
        do_job([Input(path, "jsonl")], tmp_path / "out", FakeVectors(), Columns("text", None, ("n", "m")))
    do_job([Input(path, "jsonl")], tmp_path / "out", FakeVectors(), Columns("text", None, ("n",)))
    assert read_output(tmp_path / "out").columns == {"n": ["1", None]}


def test_columns_of_parquet_keep_their_types_and_two_types_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "a.parquet", tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "id": [7, 8], "n": [[1.5], None]}), one)
    parquet.write_table(pyarrow.table({"text": ["c"], "id": ["nine"], "n": [[2.5]]}), two)
    inputs = [Input(one, "parquet"), Input(two, "parquet")]
    with pytest.raises(InputError, match=r"the column 'id' is int64 in .*a.parquet and string in .*b.parquet"):
        do_job(inputs, tmp_path / "both", FakeVectors(), COLUMNS)
    do_job(inputs[:1], tmp_path / "out", FakeVectors(), COLUMNS)
    table = parquet.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table.schema.field("id").type == pyarrow.int64()
    assert table["n"].to_pylist() == [[1.5], None]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), WIDTH)
    assert json.loads(table.schema.metadata[b"llm2vec-service"])["source"]["embedding_space"] == "fake"


def test_no_rows_at_all_is_a_job_that_is_done(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    manifest = do_job([Input(tmp_path / "a.txt", "lines")], tmp_path / "out", FakeVectors())
    assert manifest.complete
    assert manifest.shards == ()


def test_files_are_read_no_further_ahead_than_a_few_windows() -> None:
    taken = 0

    def windows() -> Iterator[Window]:
        nonlocal taken
        while True:
            taken += 1
            yield [(0, Row(taken, f"text {taken}"))]

    async def first_ten() -> None:
        found = embedded(windows(), FakeVectors(), WIDTH, lambda rows, tokens: None)
        number = 0
        async for _ in found:
            number += 1
            assert taken <= number + SIZES.windows_ahead
            if number == 10:
                break
        await found.aclose()

    asyncio.run(first_ten())


lengths = st.lists(st.integers(0, 500) | st.none(), max_size=60)


@given(lengths=lengths, rows_per_shard=st.integers(1, 20))
def test_windows_hold_all_rows_in_order_and_end_with_shards(lengths: list[int | None], rows_per_shard: int) -> None:
    rows: list[tuple[int, Row | BadRow]] = [
        (0, BadRow(n, "") if length is None else Row(n, "x" * length)) for n, length in enumerate(lengths)
    ]
    windows = list(take_windows(iter(rows), rows_per_shard, SMALL))
    assert [row for window in windows for row in window] == rows
    assert all(windows)
    ends = np.cumsum([len(window) for window in windows]).tolist()
    assert set(range(rows_per_shard, len(rows) + 1, rows_per_shard)) <= set(ends)


@given(lengths=st.lists(st.integers(0, 400), max_size=40))
def test_requests_hold_each_text_once_and_stay_small(lengths: list[int]) -> None:
    texts = {3 * place: "x" * length for place, length in enumerate(lengths)}
    requests = list(requests_of(texts, SMALL))
    assert sorted(place for request in requests for place in request) == sorted(texts)
    for request in requests:
        assert len(request) == 1 or sum(len(texts[place]) for place in request) <= SMALL.request_characters
        assert 1 <= len(request) <= SMALL.request_texts


def test_a_folder_of_texts_is_known_by_its_files(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b"):
        (texts / f"{name}.txt").write_text(f"text {name}")
    one = Input(texts, "files")
    do_job([one], tmp_path / "out", FakeVectors(), Columns("text", "path"))
    assert read_output(tmp_path / "out").columns == {"id": ["a.txt", "b.txt"]}
    os.utime(texts / "a.txt", (1, 1))
    assert do_job([one], tmp_path / "out", FakeVectors(), Columns("text", "path")).complete
    (texts / "b.txt").rename(texts / "c.txt")
    with pytest.raises(JobError, match="was begun with another"):
        do_job([one], tmp_path / "out", FakeVectors(), Columns("text", "path"))
