"""Mining: against sentence-transformers, with a tiny encoder here and behind a server, and killed on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.training.mining import Blocks, Mined, Miner, Pool, nearest
from model_store.training.negatives import MiningError, Near, Rules
from model_store.training.texts import Example, Needs, read_contrastive
from service.cli import main
from tests.e2e.process import ServerProcess
from tests.model_store.training.mined import read_rows, vectors_of, write_pairs
from tests.model_store.training.runs import texts
from tests.tiny import build_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "llama", query_instruction="Find:", document_instruction="Text:")
    return folder


def mine(
    pairs: list[Example], out: Path, corpus: list[str] | None = None, scores: bool = False, **rules: Any
) -> tuple[Mined, list[dict[str, Any]]]:
    pool = Pool.of(pairs, corpus or [])
    mined = Miner(vectors_of, "fake", Rules(**rules), CPU, scores, Blocks(8, 5, 7)).mine(pool, out)
    return mined, read_rows(out)


RULES: list[dict[str, Any]] = [
    {},
    {"num_negatives": 5, "range_min": 2},
    {"range_max": 20, "max_score": 0.995},
    {"range_min": 1, "range_max": 25, "min_score": 0.8, "num_negatives": 4},
    {"absolute_margin": 0.01, "num_negatives": 2},
    {"relative_margin": 0.02, "absolute_margin": -0.1, "num_negatives": 2},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_it_finds_what_sentence_transformers_finds(encoder: Path, tmp_path: Path, rules: dict[str, Any]) -> None:
    """With the same prompts, and several positives of a query."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "corpus.txt").write_text("\n".join(texts(40, 5)))
    options = [part for name, value in rules.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["mine", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--model", str(encoder)]
    command += ["--corpus", str(tmp_path / "corpus.txt"), "--device", "cpu", "--dtype", "float32", *options]
    assert main(command) == 0
    found = [
        (row["query"], row["positive"], negative)
        for row in read_rows(tmp_path / "out.jsonl")
        for negative in row["negative"]
    ]

    given = read_rows(tmp_path / "pairs.jsonl")
    dataset = datasets.Dataset.from_dict({key: [row[key] for row in given] for key in ("query", "positive")})
    model = sentence_transformers.SentenceTransformer(
        str(encoder), device="cpu", trust_remote_code=True, model_kwargs={"dtype": torch.float32}
    )
    corpus = list(dict.fromkeys(texts(40, 5)))
    theirs = sentence_transformers.util.mine_hard_negatives(dataset, model, corpus=corpus, verbose=False, **rules)
    assert len(found) > 20
    assert sorted(found) == sorted((row["query"], row["positive"], row["negative"]) for row in theirs)


def test_the_search_is_exact_whatever_the_blocks() -> None:
    random = np.random.default_rng(0)
    queries, documents = (random.normal(size=(n, 8)).astype(np.float32) for n in (5, 101))
    expected = np.argsort(-(queries @ documents.T), axis=1)
    for count, at_once in ((10, 3), (10, 1000), (200, 40)):
        scores, ids = nearest(queries, documents, count, CPU, at_once)
        np.testing.assert_array_equal(ids, expected[:, :count])
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ documents.T, ids, 1), rtol=1e-5, atol=1e-6)


def test_a_kill_at_any_place_changes_no_byte(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    command = [sys.executable, "-m", "tests.model_store.training.killed_mining", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    points, outputs = map(int, done.stdout.split())
    assert points > 60
    assert outputs == 1
    assert not list(tmp_path.glob(".*.partial"))


def test_a_text_that_answers_the_query_is_no_negative(tmp_path: Path) -> None:
    """Not its positives, on whatever line, and not the query's own text; a line's negatives join the corpus."""
    pairs = [Example("q", ("a",), ("n",)), Example("q", ("b",)), Example("r", ("q",)), Example("s", ("c", "d"))]
    mined, rows = mine(pairs, tmp_path / "out.jsonl", ["x"], num_negatives=9)
    found = [set(row["negative"]) for row in rows]
    assert found == [{"n", "x", "c", "d"}] * 2 + [{"n", "x", "a", "b", "c", "d"}, {"n", "x", "a", "b", "q"}]
    assert rows[3]["positive"] == ["c", "d"]
    assert (mined.pairs, mined.negatives) == (4, 19)


def test_scores_stand_in_the_order_of_the_passages(tmp_path: Path) -> None:
    _, rows = mine([Example("q", ("b", "a")), Example("r", ("c",))], tmp_path / "out.jsonl", scores=True)
    (query,) = vectors_of(["q"], None, "query")
    passages = ["b", "a", "c"]
    assert rows[0]["negative"] == ["c"]
    np.testing.assert_allclose(rows[0]["scores"], vectors_of(passages, None, "document") @ query, atol=1e-6)


def test_instructions_are_the_pairs_own_and_come_back(tmp_path: Path) -> None:
    pairs = [Example(q, (p,), (), "Find it:", "Passage:") for q, p in (("q", "a"), ("r", "b"), ("s", "c"))]
    _, rows = mine(pairs, tmp_path / "out.jsonl", num_negatives=1, scores=True)
    (query,), positives = vectors_of(["q"], "Find it:", "query"), vectors_of(["a", "b", "c"], "Passage:", "document")
    best = "abc"[1 + int((positives[1:] @ query).argmax())]
    assert rows[0] == {
        "query": "q",
        "positive": "a",
        "negative": [best],
        "instruction": "Find it:",
        "passage_instruction": "Passage:",
        "scores": pytest.approx([positives[0] @ query, positives["abc".index(best)] @ query]),
    }
    pairs[1] = Example("r", ("b",))
    with pytest.raises(MiningError, match="2 kinds of passage_instruction"):
        Pool.of(pairs, [])
    pool = Pool.of(pairs, [], "", "Text:")
    assert pool.document_instruction == "Text:"
    assert list(pool.positives) == [("q", ""), ("r", ""), ("s", "")]


def test_near_duplicates_are_left_out() -> None:
    """Of a positive, and of a negative that was chosen before."""
    positive = np.array([[1, 0, 0]], np.float32)
    candidates = np.array([[1, 0.1, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1]], np.float32)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    rules = Rules(duplicate_score=0.95)
    places, left_out = rules.choose(scores, scores[:1], Near(candidates, positive, 0.95), 0)
    assert places == [1, 3]
    assert left_out == {"duplicate_score": 2}


def test_random_negatives_are_the_same_each_time_and_others_for_each_query() -> None:
    scores = np.linspace(0.9, 0.1, 50, dtype=np.float32)
    rules = Rules(sampling_strategy="random", range_max=40, seed=3)
    found = [rules.choose(scores, scores[:1], None, number)[0] for number in range(200)]
    assert found == [rules.choose(scores, scores[:1], None, number)[0] for number in range(200)]
    assert all(places == sorted(set(places)) and len(places) == 3 for places in found)
    assert {place for places in found for place in places} == set(range(40))


def test_pairs_without_a_negative_are_left_out(tmp_path: Path) -> None:
    pairs = read_contrastive(write_pairs(tmp_path / "pairs.jsonl"))
    mined, rows = mine(pairs, tmp_path / "out.jsonl", max_score=-2.0)
    assert (rows, mined.pairs, mined.negatives) == ([], 0, 0)
    assert mined.left_out["max_score"] > 20


def test_a_server_s_vectors_give_the_same_and_training_reads_it(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "pairs.jsonl", instruction="Look for:")
    command = ["mine", str(tmp_path / "pairs.jsonl"), "--relative-margin", "-0.05", "--output-scores"]
    local, served = tmp_path / "local.jsonl", tmp_path / "served.jsonl"
    options = ["--model", str(encoder), "--device", "cpu", "--dtype", "float32"]
    assert main([*command, "--out", str(local), *options]) == 0
    assert "left out by relative_margin: " in capsys.readouterr().out
    with ServerProcess(encoder, {"LLM2VEC_DEVICE": "cpu", "LLM2VEC_DTYPE": "float32"}) as server:
        assert main([*command, "--out", str(served), "--url", server.base_url]) == 0
    rows, others = read_rows(local), read_rows(served)
    assert len(rows) > 20
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(row.pop("scores"), other.pop("scores"), atol=1e-5)
        assert row == other
    examples = read_contrastive(local, needs=Needs(scores=True, negatives=True))
    assert [list(each.negatives) for each in examples] == [row["negative"] for row in rows]
    assert {each.instruction for each in examples} == {"Look for:"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ('{"query": "q", "positive": "p"}\n{"query": "q"}\n', [], "pairs.jsonl, line 2: there is no 'positive'"),
        ("", [], "there are no pairs to mine negatives for"),
        ("{}", ["--corpus", "{here}/bad.jsonl"], "bad.jsonl, line 1: "),
        ("{}", ["--num-negatives", "0"], "num_negatives is 0: at least 1"),
        (
            "{}",
            ["--range-min", "3", "--range-max", "5"],
            "range_max is 5: at least range_min + num_negatives, which is 6",
        ),
        ("{}", ["--out", "{here}/pairs.jsonl"], "pairs.jsonl is there already"),
    ],
)
def test_errors_name_file_and_line(
    content: str, options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"query": "q", "positive": "p"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) if content == "{}" else content)
    (tmp_path / "bad.jsonl").write_text("[]\n")
    command = ["mine", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--model", "absent"]
    assert main(command + [option.format(here=tmp_path) for option in options]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_another_job_s_blocks_are_not_taken(tmp_path: Path) -> None:
    pool = Pool.of(read_contrastive(write_pairs(tmp_path / "pairs.jsonl")), [])

    def breaks(*asked: Any) -> Any:
        raise MiningError("no more")

    def job(embed: Any, **rules: Any) -> None:
        Miner(embed, "fake", Rules(**rules), CPU, False, Blocks(8, 5, 7)).mine(pool, tmp_path / "out.jsonl")

    with pytest.raises(MiningError, match="no more"):
        job(lambda *asked: breaks() if asked[2] == "query" else vectors_of(*asked))
    with pytest.raises(MiningError, match=r"out.jsonl.work was begun with another range_min: put that back to go on"):
        job(vectors_of, range_min=1)
    job(lambda *asked: breaks() if asked[2] == "document" else vectors_of(*asked))
    assert len(read_rows(tmp_path / "out.jsonl")) == len(pool.pairs)


def test_a_vector_that_is_not_finite_is_told(tmp_path: Path) -> None:
    pool = Pool.of([Example("q", ("p",)), Example("r", ("bad one",))], [])

    def embed(some: Any, *more: Any) -> Any:
        return np.array([[np.nan if text == "bad one" else 1.0] for text in some], np.float32)

    with pytest.raises(MiningError, match="the vector of the text that begins 'bad one' is not finite"):
        Miner(embed, "fake", Rules(), CPU).mine(pool, tmp_path / "out.jsonl")
