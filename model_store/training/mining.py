"""Mines hard negatives for pairs: embeds queries and documents, searches exactly, and writes lines for training.

Texts are held in memory, and vectors are on disk. All work is done in blocks, and a block that is finished is kept in a
folder beside the output: after a kill the same job goes on there, and arrives at the same bytes if the encoder gives
the same vectors.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.build.progress import bar_class
from model_store.evaluation.command import EmbedTexts
from model_store.manifest import Role
from model_store.text.files import appearing_whole
from model_store.text.tokenizer import TokenizationError
from model_store.training.negatives import MiningError, Near, Rules
from model_store.training.texts import Example

# Q queries, N documents, D width

# A text and its instruction; None leaves the instruction to the encoder.
_Asked = tuple[str, str | None]

_Floats = NDArray[np.float32]
_Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """The texts that are embedded, and the queries and documents that are compared, at a time."""

    texts: int = 1024
    queries: int = 1024
    documents: int = 16384


@dataclass(frozen=True)
class Pool:
    """All queries, and all documents that may be negatives, each once.

    `asked` are the pairs' queries, `positives` the documents that each query must find, and documents are `places`.
    """

    pairs: Sequence[Example]
    asked: Sequence[_Asked]
    positives: Mapping[_Asked, set[int]]
    places: Mapping[str, int]
    document_instruction: str | None

    @classmethod
    def of(
        cls,
        pairs: Sequence[Example],
        corpus: Iterable[str],
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ) -> Pool:
        """A query on several lines has the positives of all of them. Instructions given here replace the pairs' own.

        Raises:
            MiningError: if there are no pairs, or they ask for different instructions before the same documents.
        """
        if not pairs:
            raise MiningError("there are no pairs to mine negatives for: give a file with some")
        if document_instruction is None:
            of_passages = {pair.passage_instruction for pair in pairs}
            if len(of_passages) > 1:
                raise MiningError(
                    f"the pairs have {len(of_passages)} kinds of passage_instruction, and a document is embedded once: "
                    "mine each kind in a file of its own, or give --document-instruction"
                )
            document_instruction = of_passages.pop() or None
        texts = dict.fromkeys([*corpus, *(text for pair in pairs for text in pair.passages)])
        places = {text: place for place, text in enumerate(texts)}
        asked: list[_Asked] = []
        positives: dict[_Asked, set[int]] = defaultdict(set)
        for pair in pairs:
            own = pair.instruction or None
            asked.append((pair.query, own if query_instruction is None else query_instruction))
            positives[asked[-1]].update(places[text] for text in pair.positives)
        return cls(pairs, asked, positives, places, document_instruction)

    def digest(self) -> str:
        """A hash of everything that the output depends on."""
        content = sha256(repr(self.document_instruction).encode())
        for part in (*self.places, *self.pairs, *self.asked):
            content.update(repr(part).encode())
        return content.hexdigest()


@dataclass(frozen=True)
class Mined:
    """The numbers of `pairs` that have negatives and of their `negatives`; and by rule, of candidates left out."""

    pairs: int
    negatives: int
    left_out: Counter[str]


@dataclass(frozen=True)
class Miner:
    """`encoder` names everything that changes the vectors; `device` is where the search is computed."""

    embed: EmbedTexts
    encoder: str
    rules: Rules
    device: torch.device
    output_scores: bool = False
    blocks: Blocks = Blocks()

    def mine(self, pool: Pool, out: Path) -> Mined:
        """Do the job, or the rest of it.

        Raises:
            MiningError: if another job was begun for this output, or a text has no vector.
            UserError, ServiceError: what the encoder raises; finished blocks stay.
        """
        job = {"pairs and corpus": pool.digest(), "encoder": self.encoder, **asdict(self.rules)}
        work = _Work(out.with_name(f".{out.name}.work"), job, self.blocks)
        texts = [(text, pool.document_instruction) for text in pool.places]
        documents = work.vectors("documents", texts, self.embed, "document")
        queries = work.vectors("queries", list(pool.positives), self.embed, "query")
        self._search(pool, documents, queries, work)
        with appearing_whole(out) as file:
            mined = self._write(pool, work, file.write)
        shutil.rmtree(work.folder)
        return mined

    def _search(self, pool: Pool, documents: _Floats, queries: _Floats, work: _Work) -> None:
        most_positives = max(map(len, pool.positives.values()))
        rules = self.rules.for_queries_with(most_positives)
        most, done, asked = (rules.range_max or 0) + most_positives, work.done["searched"], list(pool.positives)
        total = len(queries) * len(documents)
        with bar_class()(total=total, desc="search", unit="comparison", unit_scale=True) as bar:
            bar.update(done * len(documents))
            for start in range(done, len(queries), self.blocks.queries):
                block = np.array(queries[start : start + self.blocks.queries])
                scores, ids = nearest(block, documents, most + 1, self.device, self.blocks.documents, bar.update)
                lines = []
                for place, vector in enumerate(block):
                    query = asked[start + place]
                    positives = sorted(pool.positives[query])
                    others = np.flatnonzero(ids[place] != pool.places.get(query[0], -1))[:most]
                    others = others[~np.isin(ids[place, others], positives)]
                    found = scores[place, others], ids[place, others]
                    lines.append(_line(rules, start + place, vector, positives, *found, documents))
                work.add(lines)

    def _write(self, pool: Pool, work: _Work, write: Callable[[str], Any]) -> Mined:
        lines = dict(zip(pool.positives, work.lines(), strict=True))
        documents = list(pool.places)
        pairs = negatives = 0
        for pair, asked in zip(pool.pairs, pool.asked, strict=True):
            found = lines[asked]["negatives"]
            if not found:
                continue
            pairs, negatives = pairs + 1, negatives + len(found)
            row: dict[str, Any] = {
                "query": pair.query,
                "positive": pair.positives[0] if len(pair.positives) == 1 else pair.positives,
                "negative": [documents[int(place)] for place in found],
            }
            for name in ("instruction", "passage_instruction"):
                if text := getattr(pair, name):
                    row[name] = text
            if self.output_scores:
                scores = [lines[asked]["positives"][str(pool.places[text])] for text in pair.positives]
                row["scores"] = [*scores, *found.values()]
            write(json.dumps(row, ensure_ascii=False) + "\n")
        left_out = sum((Counter(line["left_out"]) for line in lines.values()), Counter[str]())
        return Mined(pairs, negatives, left_out)


def _line(
    rules: Rules, number: int, query: _Floats, positives: list[int], scores: _Floats, ids: _Ids, documents: _Floats
) -> dict[str, dict[Any, Any]]:
    """Scores by document: of a query's positives, and of those candidates that become negatives."""
    of_positives = np.array(documents[positives])
    positive_scores = of_positives @ query
    near = None
    if rules.duplicate_score is not None:
        near = Near(np.array(documents[ids]), of_positives, rules.duplicate_score)
    chosen, left_out = rules.choose(scores, positive_scores, near, number)
    return {
        "positives": dict(zip(positives, positive_scores.tolist(), strict=True)),
        "negatives": dict(zip(ids[chosen].tolist(), scores[chosen].tolist(), strict=True)),
        "left_out": left_out,
    }


def nearest(
    queries: _Floats,
    documents: _Floats,
    most: int,
    device: torch.device,
    at_once: int,
    on_done: Callable[[int], object] = lambda comparisons: None,
) -> tuple[_Floats, _Ids]:
    """(Q, most) scores and places of the documents of the largest products with each query, falling; all if fewer.

    Of (N, D) documents only `at_once` are in memory at a time, with their products.
    """
    asked = torch.from_numpy(queries).to(device)
    scores = torch.empty((len(queries), 0), device=device)
    ids = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    for start in range(0, len(documents), at_once):
        block = torch.from_numpy(np.array(documents[start : start + at_once])).to(device)
        some = (asked @ block.T).topk(min(most, len(block)))
        best = torch.cat([scores, some.values], 1).topk(min(most, scores.shape[1] + some.values.shape[1]))
        scores, ids = best.values, torch.cat([ids, some.indices + start], 1).gather(1, best.indices)
        on_done(len(queries) * len(block))
    return scores.cpu().numpy(), ids.cpu().numpy()


class _Work:
    """The folder of an unfinished job. `state.json` says how much of its files counts, and is replaced whole."""

    def __init__(self, folder: Path, job: dict[str, Any], blocks: Blocks) -> None:
        """Raises MiningError if the folder is another job's."""
        self.folder, self._job, self._texts_at_once = folder, job, blocks.texts
        self.done = {"documents": 0, "queries": 0, "searched": 0, "bytes": 0}
        folder.mkdir(exist_ok=True)
        path = folder / "state.json"
        if path.is_file():
            state = json.loads(path.read_text())
            if changed := [name for name in job if job[name] != state["job"].get(name)]:
                raise MiningError(
                    f"{folder} was begun with another {', '.join(changed)}: put that back to go on, or remove the "
                    "folder to begin anew"
                )
            self.done = state["done"]

    def vectors(self, name: str, texts: Sequence[_Asked], embed: EmbedTexts, role: Role) -> _Floats:
        """(n, D) vectors of all texts, in a file."""
        path = self.folder / f"{name}.npy"
        with bar_class()(total=len(texts), initial=self.done[name], desc=name, unit="text") as bar:
            for start in range(self.done[name], len(texts), self._texts_at_once):
                some = texts[start : start + self._texts_at_once]
                found = _embedded(some, embed, role)
                shape = (len(texts), found.shape[1])
                whole = np.lib.format.open_memmap(path, "r+" if start else "w+", np.float32, None if start else shape)
                whole[start : start + len(some)] = found
                whole.flush()
                self._mark(**{name: start + len(some)})
                bar.update(len(some))
        vectors: _Floats = np.load(path, mmap_mode="r")
        return vectors

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keep the results of a block of queries."""
        with (self.folder / "found.jsonl").open("ab") as file:
            file.truncate(self.done["bytes"])
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            size = file.tell()
        self._mark(searched=self.done["searched"] + len(lines), bytes=size)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "found.jsonl").read_text().splitlines()]

    def _mark(self, **done: int) -> None:
        self.done |= done
        with appearing_whole(self.folder / "state.json") as file:
            json.dump({"job": self._job, "done": self.done}, file)


def _embedded(texts: Sequence[_Asked], embed: EmbedTexts, role: Role) -> _Floats:
    together: dict[str | None, list[int]] = defaultdict(list)
    for place, (_, instruction) in enumerate(texts):
        together[instruction].append(place)
    vectors: _Floats | None = None
    for instruction, places in together.items():
        some = [texts[place][0] for place in places]
        try:
            found = embed(some, instruction, role)
        except TokenizationError as error:
            raise MiningError(f"{error}, in the text that begins {some[error.index][:60]!r}") from error
        if not (finite := np.isfinite(found).all(1)).all():
            raise MiningError(f"the vector of the text that begins {some[int(finite.argmin())][:60]!r} is not finite")
        vectors = np.empty((len(texts), found.shape[1]), np.float32) if vectors is None else vectors
        vectors[places] = found
    assert vectors is not None, "a block has a text"
    return vectors
