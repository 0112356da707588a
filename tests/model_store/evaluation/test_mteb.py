"""mteb's own evaluation over our vectors; its mock tasks and a task made here need no download."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_store.evaluation.files import DatasetError
from model_store.evaluation.sts import ScoredPair, evaluate_sts
from model_store.templates import VERBATIM
from model_store.text.prompts import EncoderPrompts, Prompt, load_prompts
from tests.model_store.evaluation.vectors import HashedVectors

mteb = pytest.importorskip("mteb", reason="mteb is in the extra `eval`")
# Of mteb and what it brings.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]

PAIRS = [
    ScoredPair("a plane is taking off", "a plane takes off", 4.8),
    ScoredPair("the river ran past the mill", "the mill stands by the river", 3.6),
    ScoredPair("a man plays a flute", "a man eats", 1.2),
    ScoredPair("how much protein a day", "the stock market fell", 0.0),
]


def sts_task(prompt: Any = None) -> Any:
    """A task of MTEB with its data in memory."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.mocks.mock_tasks.sts import MockSTSTask

    class FourPairs(AbsTaskSTS):  # type: ignore[misc]
        metadata = MockSTSTask.metadata.model_copy(update={"name": "FourPairs", "prompt": prompt})
        min_score, max_score = 0, 5

        def load_data(self, **_: Any) -> None:
            columns = {
                "sentence1": [pair.first for pair in PAIRS],
                "sentence2": [pair.second for pair in PAIRS],
                "score": [pair.score for pair in PAIRS],
            }
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    return FourPairs()


def test_a_task_gets_the_score_that_we_compute_ourselves() -> None:
    from model_store.evaluation.mteb_tasks import MtebTask

    (score,) = MtebTask(sts_task()).evaluate("org/model", HashedVectors())
    vectors = HashedVectors().embed([text for pair in PAIRS for text in (pair.first, pair.second)])["hashed"]
    assert (score.model, score.task, score.setting) == ("org/model", "MTEB, FourPairs", "test")
    assert score.metric == "cosine_spearman"
    assert score.value == pytest.approx(evaluate_sts(PAIRS, vectors), abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "own", "asked"),
    [
        (None, None, "Retrieve semantically similar text:"),  # LLM2Vec's for tasks of this type
        ("Retrieve similar text.", None, "Retrieve similar text:"),
        ({"query": "Find:"}, None, "Find:"),
        ("Retrieve similar text.", {"FourPairs": "Mine:"}, "Mine:"),
        ("Retrieve similar text.", {"Other": "Mine:"}, "Retrieve similar text:"),
    ],
)
def test_the_instruction_is_the_tasks_or_ones_own(prompt: Any, own: dict[str, str] | None, asked: str) -> None:
    from model_store.evaluation.mteb_tasks import MtebTask

    vectors = HashedVectors()
    MtebTask(sts_task(prompt), own).evaluate("m", vectors)
    assert {(instruction, role) for _, instruction, role in vectors.asked} == {(asked, None)}


LLM2VEC = EncoderPrompts(load_prompts())
BY_WORDS = EncoderPrompts({}, "Instruct: {instruction}\nQuery: ")
OWN = {"query": "query: ", "document": "passage: ", "STS": "alike: ", "NQ": "nq: ", "Retrieval-document": "read: "}
PROMPTED = EncoderPrompts({name: Prompt(prompt, prompt) for name, prompt in OWN.items()}, VERBATIM)


@pytest.mark.parametrize(
    ("prompts", "task", "kind", "prompt", "role", "asked"),
    [
        (LLM2VEC, "NQ", "Retrieval", "mteb's", "query", load_prompts()["NQ"].query),
        (LLM2VEC, "NQ", "Retrieval", "mteb's", "document", ""),
        (
            LLM2VEC,
            "Banking77Classification",
            "Classification",
            "mteb's",
            None,
            load_prompts()["Banking77Classification"].query,
        ),
        (LLM2VEC, "New", "Retrieval", {"query": "mteb's."}, "query", "mteb's:"),
        (LLM2VEC, "New", "PairClassification", None, None, load_prompts()["pair-classification"].query),
        (LLM2VEC, "New", "Reranking", "mteb's", "document", None),
        (BY_WORDS, "New", "Retrieval", "mteb's", "query", "mteb's"),
        (BY_WORDS, "New", "Retrieval", "mteb's", "document", None),
        (PROMPTED, "NQ", "Retrieval", "mteb's", "query", "nq: "),
        (PROMPTED, "New", "STS", "mteb's", None, "alike: "),
        (PROMPTED, "New", "Retrieval", "mteb's", "document", "read: "),
        (PROMPTED, "New", "Retrieval", "mteb's", "query", None),
        (PROMPTED, "New", "Clustering", "mteb's", None, None),
    ],
)
def test_an_encoder_s_own_prompt_for_a_task(
    prompts: EncoderPrompts, task: str, kind: str, prompt: Any, role: Any, asked: str | None
) -> None:
    """None leaves it to the encoder: its prompt of the role, or its default prompt."""
    from model_store.evaluation.mteb_tasks import task_instruction

    assert task_instruction(prompts, SimpleNamespace(name=task, type=kind, prompt=prompt), role) == asked


def test_documents_get_no_instruction() -> None:
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask

    from model_store.evaluation.mteb_tasks import MtebTask

    vectors = HashedVectors()
    task = MockRetrievalTask()
    scores = MtebTask(task, {task.metadata.name: "Find:"}).evaluate("m", vectors)
    assert [score.setting for score in scores] == list(task.metadata.eval_splits)
    assert {text: asked for texts, *asked in vectors.asked for text in texts} == {
        "This is a test sentence": ["Find:", "query"],
        "This is another test sentence": ["Find:", "query"],
        "Title of d1 This is a positive sentence": ["", "document"],
        "Title of d2 This is another positive sentence": ["", "document"],
    }


def test_every_kind_of_text_task_runs() -> None:
    from model_store.evaluation.mteb_tasks import MtebEncoder

    results = mteb.mock_run(MtebEncoder("m", HashedVectors()))
    failed = {
        name: str(result) for name, result in results.task_results.items() if "TaskError" in type(result).__name__
    }
    ran = [name for name, result in results.task_results.items() if "TaskResult" in type(result).__name__]
    assert not failed
    assert len(ran) > 10


def test_names_and_instructions_that_are_none(tmp_path: Path) -> None:
    from model_store.evaluation.mteb_tasks import mteb_tasks

    with pytest.raises(DatasetError, match="does not know the task"):
        mteb_tasks(["STSBenchmarc"])
    path = tmp_path / "instructions.json"
    for content in ("{", json.dumps(["a"]), json.dumps({"STS12": 1}), json.dumps({"STS12": "\ud83d"})):
        path.write_text(content)
        with pytest.raises(DatasetError, match=r"instructions\.json"):
            mteb_tasks(["STSBenchmark"], path)
    path.write_text("\ufeff" + json.dumps({"STSBenchmark": "Retrieve similar text:"}), encoding="utf-8")
    assert len(mteb_tasks(["STSBenchmark"], path)) == 1


def test_data_that_can_not_be_had_is_said() -> None:
    from model_store.evaluation.mteb_tasks import MtebTask

    task = sts_task()
    task.dataset, task.metadata = None, task.metadata.model_copy(update={"name": "Far"})

    def load_data(**_: Any) -> None:
        raise ConnectionError("no route to host")

    task.load_data = load_data
    with pytest.raises(DatasetError, match=r"the data of Far \(no route to host\): it comes from the hub"):
        MtebTask(task).evaluate("m", HashedVectors())
