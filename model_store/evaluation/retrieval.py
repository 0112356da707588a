"""Retrieval by cosine: is a query's vector near the vectors of the documents that people judged relevant?

Data is in the layout of BEIR (Thakur et al. 2021); the measures are trec_eval's ndcg_cut.10, recall.100 and recip_rank.
Documents with the same score, such as those with the same text, rank as in trec_eval, and so in BEIR, MTEB and
ir-measures: in falling order of their ids. scikit-learn's ndcg_score takes the mean over all orders instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_store.evaluation.files import DatasetError, number_field, read_json_lines, read_table, text_field
from model_store.evaluation.report import Score, TextVectors

# Q queries, N documents, D width

_QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class Collection:
    """Texts by id, and for each query its relevant documents with their gains: at least one."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, float]]


def read_collection(folder: Path) -> Collection:
    """The collection in a folder: corpus.jsonl, queries.jsonl and qrels/test.tsv (the first two may be .gz).

    A document is its title, if it has one, and its text; it is a space if both are empty. A query without a relevant
    document is left out. A judgement that is repeated unchanged counts once.

    Raises:
        DatasetError: naming the file and line that can't be read, that names a missing text, or that contradicts an
            earlier judgement.
    """
    documents = _texts(_one_of(folder, "corpus.jsonl"))
    queries = _texts(_one_of(folder, "queries.jsonl"))
    path = folder / "qrels" / "test.tsv"
    judged: dict[tuple[str, str], tuple[int, float]] = {}
    relevant: dict[str, dict[str, float]] = {}
    for number, row in read_table(path):
        query, document = text_field(path, number, row, "query-id"), text_field(path, number, row, "corpus-id")
        if query not in queries or document not in documents:
            missing = f"query {query!r}" if query not in queries else f"document {document!r}"
            raise DatasetError(f"{path}, line {number}: there is no {missing}")
        gain = number_field(path, number, row, "score")
        line, before = judged.setdefault((query, document), (number, gain))
        if gain != before:
            raise DatasetError(
                f"{path}, line {number}: query {query!r} and document {document!r} have the score {gain:g}, and "
                f"{before:g} in line {line}: leave one of them out"
            )
        if gain > 0:
            relevant.setdefault(query, {})[document] = gain
    if not relevant:
        raise DatasetError(f"{path} judges no document as relevant")
    return Collection(documents, {query: queries[query] for query in relevant}, relevant)


@dataclass(frozen=True)
class Measures:
    """The measures, as means over the queries."""

    ndcg_at_10: float
    recall_at_100: float
    mrr: float


def measure(collection: Collection, documents: NDArray[np.float32], queries: NDArray[np.float32]) -> Measures:
    """Rank by the product of (N, D) and (Q, D) normalised vectors, in the collection's order.

    As in BEIR, a document that has the query's own id is not counted as found.
    """
    places = {name: place for place, name in enumerate(collection.documents)}
    by_id = np.empty(len(places), dtype=np.int64)
    by_id[[places[name] for name in sorted(places, key=str.encode, reverse=True)]] = np.arange(len(places))
    sums = np.zeros(3)
    names = list(collection.queries)
    for start in range(0, len(names), _QUERIES_AT_ONCE):
        some = names[start : start + _QUERIES_AT_ONCE]
        scores = queries[start : start + len(some)] @ documents.T  # (some, N)
        for name, row in zip(some, scores, strict=True):
            if name in places:
                row[places[name]] = -np.inf
            gains = {places[document]: gain for document, gain in collection.relevant[name].items()}
            sums += _of_one_query(row, gains, by_id)
    ndcg, recall, reciprocal = (sums / len(names)).tolist()
    return Measures(ndcg, recall, reciprocal)


class Retrieval:
    """nDCG@10, recall@100 and MRR of a folder; instructions that are None are the encoder's own."""

    def __init__(
        self, folder: Path, query_instruction: str | None = None, document_instruction: str | None = None
    ) -> None:
        self._name = f"retrieval, {folder.resolve().name}"
        self._of_queries, self._of_documents = query_instruction, document_instruction
        self._collection = read_collection(folder)

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        """Three scores for each setting."""
        documents = vectors.embed(list(self._collection.documents.values()), self._of_documents, "document")
        queries = vectors.embed(list(self._collection.queries.values()), self._of_queries, "query")
        scores = []
        for setting in documents:
            found = measure(self._collection, documents[setting], queries[setting])
            measures = {"nDCG@10": found.ndcg_at_10, "recall@100": found.recall_at_100, "MRR": found.mrr}
            scores += [Score(model, self._name, metric, setting, value) for metric, value in measures.items()]
        return scores


def _of_one_query(
    scores: NDArray[np.float32], gains: dict[int, float], by_id: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(3,): nDCG@10 with linear gains (Järvelin and Kekäläinen 2002), recall@100 and the reciprocal rank.

    `by_id` (N,) is each document's rank among documents with the same score. A score of −∞ is not counted as found.
    """
    least = np.partition(scores, -100)[-100] if len(scores) > 100 else -np.inf
    best = np.flatnonzero((scores >= least) & (scores > -np.inf))
    best = best[np.lexsort((by_id[best], -scores[best]))][:100]
    found = np.array([gains.get(int(place), 0.0) for place in best])
    ideal = np.sort(list(gains.values()))[::-1][:10]
    discounts = 1 / np.log2(np.arange(2, 12))
    ndcg = (found[:10] * discounts[: len(found[:10])]).sum() / (ideal * discounts[: len(ideal)]).sum()
    first = min(gains, key=lambda place: (-scores[place], by_id[place]))
    before = (scores > scores[first]) | ((scores == scores[first]) & (by_id < by_id[first]))
    reciprocal = 1 / (1 + before.sum()) if scores[first] > -np.inf else 0.0
    return np.array([ndcg, (found > 0).sum() / len(gains), reciprocal])


def _texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, row in read_json_lines(path):
        name = text_field(path, number, row, "_id")
        if name in texts:
            raise DatasetError(f"{path}, line {number}: {name!r} is there already")
        title = "" if row.get("title") is None else text_field(path, number, row, "title", blank=True)
        texts[name] = f"{title} {text_field(path, number, row, 'text', blank=True)}".strip() or " "
    return texts


def _one_of(folder: Path, name: str) -> Path:
    """The path of the file, or of its gzipped form if only that exists."""
    path = folder / name
    zipped = folder / f"{name}.gz"
    return zipped if zipped.is_file() and not path.is_file() else path
