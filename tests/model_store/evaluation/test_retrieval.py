"""Ranking measures against plain definitions, computed by sorting everything in Python."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from model_store.evaluation.files import DatasetError
from model_store.evaluation.retrieval import Collection, Retrieval, measure, read_collection
from tests.model_store.evaluation.vectors import HashedVectors


def write_collection(folder: Path, qrels: str) -> Path:
    documents = [
        {"_id": "d1", "title": "Rivers", "text": "The river ran past the mill."},
        {"_id": "d2", "title": "", "text": "A plane is taking off."},
        {"_id": "d3", "text": ""},
    ]
    queries = [{"_id": "q1", "text": "which river?"}, {"_id": "q2", "text": "planes"}, {"_id": "q3", "text": "no one"}]
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(item) + "\n" for item in documents))
    (folder / "queries.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(q) + "\n" for q in queries).encode()))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def test_reads_the_layout_of_beir(tmp_path: Path) -> None:
    found = read_collection(
        write_collection(tmp_path / "a", "q2\td2\t2\nq1\td1\t1\nq1\td1\t1.0\nq1\td2\t0\nq3\td3\t0\n")
    )
    assert found.documents == {"d1": "Rivers The river ran past the mill.", "d2": "A plane is taking off.", "d3": " "}
    assert found.queries == {"q2": "planes", "q1": "which river?"}
    assert found.relevant == {"q2": {"d2": 2.0}, "q1": {"d1": 1.0}}


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1\td9\t1\n", "line 2: there is no document 'd9'"),
        ("q9\td1\t1\n", "line 2: there is no query 'q9'"),
        ("q1\td1\tgood\n", "line 2: score is 'good', not a number"),
        ("q1\td1\n", "line 2: 2 columns, the header has 3"),
        ("q1\td1\t1\nq1\td1\t0\n", "line 3: query 'q1' and document 'd1' have the score 0, and 1 in line 2"),
        ("q1\td1\tnan\n", "line 2: score is 'nan', not a number"),
        ("q1\td1\t0\n", "judges no document as relevant"),
    ],
)
def test_a_bad_judgement_names_the_line(tmp_path: Path, qrels: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_collection(write_collection(tmp_path / "a", qrels))


def test_a_bad_corpus_names_the_line(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "a", "q1\td1\t1\n")
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n')
    with pytest.raises(DatasetError, match="line 2: 'd1' is there already"):
        read_collection(folder)
    corpus.write_text('{"_id": "d1"}\n')
    with pytest.raises(DatasetError, match="line 1: there is no text 'text'"):
        read_collection(folder)
    corpus.write_text('{"_id": "d1", "text": null}\n')
    with pytest.raises(DatasetError, match="line 1: there is no text 'text', it is null"):
        read_collection(folder)
    corpus.write_text('{"_id": "d1", "title": 5, "text": "a"}\n')
    with pytest.raises(DatasetError, match="line 1: there is no text 'title', it is 5"):
        read_collection(folder)
    corpus.unlink()
    with pytest.raises(DatasetError, match=r"corpus\.jsonl can't be read"):
        read_collection(folder)


def expected(collection: Collection, scores: dict[str, dict[str, float]]) -> tuple[float, float, float]:
    """The three measures by their definitions."""
    sums = [0.0, 0.0, 0.0]
    for query, gains in collection.relevant.items():
        ranking = sorted((name for name in scores[query] if name != query), key=lambda name: -scores[query][name])
        gained = sum(gains.get(name, 0) / math.log2(rank + 1) for rank, name in enumerate(ranking[:10], 1))
        ideal = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(sorted(gains.values())[::-1][:10], 1))
        sums[0] += gained / ideal
        sums[1] += len(gains.keys() & set(ranking[:100])) / len(gains)
        sums[2] += 1 / next(rank for rank, name in enumerate(ranking, 1) if name in gains)
    ndcg, recall, reciprocal = (value / len(collection.relevant) for value in sums)
    return ndcg, recall, reciprocal


@pytest.mark.parametrize("documents", [7, 400])
def test_measures_are_their_definitions(documents: int) -> None:
    """400 documents, so that recall@100 is below 1; a query has up to 15 relevant ones, and one is a document too."""
    random = np.random.default_rng(0)
    names = [f"d{n}" for n in range(documents)]
    queries = ["d3", *(f"q{n}" for n in range(150))]
    relevant = {
        query: {
            name: float(random.integers(1, 4))
            for name in random.choice(names, random.integers(1, min(15, documents)), replace=False)
            if name != query
        }
        or {"d0": 1.0}
        for query in queries
    }
    collection = Collection(dict.fromkeys(names, ""), dict.fromkeys(queries, ""), relevant)
    left, right = random.normal(size=(documents, 4)), random.normal(size=(len(queries), 4))
    found = measure(collection, left.astype(np.float32), right.astype(np.float32))
    products = right.astype(np.float32) @ left.astype(np.float32).T
    scores = {query: dict(zip(names, row.tolist(), strict=True)) for query, row in zip(queries, products, strict=True)}
    assert (found.ndcg_at_10, found.recall_at_100, found.mrr) == pytest.approx(expected(collection, scores))
    assert documents == 7 or found.recall_at_100 < 0.5


def test_a_query_does_not_find_itself() -> None:
    collection = Collection({"a": "", "b": ""}, {"a": ""}, {"a": {"a": 1.0}})
    found = measure(collection, np.eye(2, dtype=np.float32), np.ones((1, 2), dtype=np.float32))
    assert (found.ndcg_at_10, found.recall_at_100, found.mrr) == (0, 0, 0)


def test_ndcg_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    gains, vectors = random.integers(0, 4, size=50), random.normal(size=(50, 1)).astype(np.float32)
    relevant = {"q": {f"d{n}": float(gain) for n, gain in enumerate(gains) if gain}}
    collection = Collection({f"d{n}": "" for n in range(50)}, {"q": ""}, relevant)
    found = measure(collection, vectors, np.ones((1, 1), dtype=np.float32))
    assert found.ndcg_at_10 == pytest.approx(metrics.ndcg_score([gains], [vectors[:, 0]], k=10))


@pytest.mark.parametrize("documents", [30, 400])
def test_documents_with_the_same_score_rank_as_in_trec_eval(documents: int) -> None:
    """Scores of one digit, so that most are ties, also of the tenth and the hundredth; ids are ordered by bytes."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    random = np.random.default_rng(2)
    names = [f"{'dDé9'[n % 4]}{n}" for n in range(documents)]
    queries = [f"q{n}" for n in range(20)]
    relevant = {q: dict.fromkeys(random.choice(names, 12, replace=False).tolist(), 1.0) for q in queries}
    collection = Collection(dict.fromkeys(names, ""), dict.fromkeys(queries, ""), relevant)
    left = random.integers(0, 4, size=(documents, 2)).astype(np.float32)
    right = random.integers(0, 3, size=(len(queries), 2)).astype(np.float32)
    found = measure(collection, left, right)
    judged = {query: {name: int(gain) for name, gain in gains.items()} for query, gains in relevant.items()}
    ranked = {
        query: dict(zip(names, row, strict=True)) for query, row in zip(queries, (right @ left.T).tolist(), strict=True)
    }
    names_there = ("ndcg_cut.10", "recall.100", "recip_rank")
    each = pytrec_eval.RelevanceEvaluator(judged, names_there).evaluate(ranked).values()
    theirs = [np.mean([one[name.replace(".", "_")] for one in each]) for name in names_there]
    assert (found.ndcg_at_10, found.recall_at_100, found.mrr) == pytest.approx(theirs)


def test_each_side_has_its_instruction_and_else_the_encoder_chooses_by_role(tmp_path: Path) -> None:
    vectors = HashedVectors()
    folder = write_collection(tmp_path / "small", "q1\td1\t1\n")
    scores = Retrieval(folder, "Find:").evaluate("m", vectors)
    assert [(score.task, score.metric) for score in scores] == [
        ("retrieval, small", metric) for metric in ("nDCG@10", "recall@100", "MRR")
    ]
    Retrieval(folder, document_instruction="").evaluate("m", vectors)
    assert [(instruction, role) for _, instruction, role in vectors.asked] == [
        *[(None, "document"), ("Find:", "query")],
        *[("", "document"), (None, "query")],
    ]
    assert vectors.asked[1][0] == ["which river?"]
