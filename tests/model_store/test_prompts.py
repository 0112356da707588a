from __future__ import annotations

import pytest

from model_store.recipe import packaged_recipes
from model_store.text.prompts import Prompt, UnknownPrompt, find_prompt, load_prompts


def test_retrieval_instructs_queries_and_sts_both_sides() -> None:
    prompts = load_prompts()
    assert prompts["NQ"] == Prompt("Given a question, retrieve Wikipedia passages that answer the question:", "")
    assert prompts["STS12"] == Prompt("Retrieve semantically similar text:", "Retrieve semantically similar text:")
    assert prompts["document"] == Prompt("", "")


@pytest.mark.parametrize(
    ("part", "tasks", "both_sides"),
    [
        ("Classification", 12, True),
        ("Clustering", 11, True),
        ("STS", 8, True),
        ("Reranking", 1, False),
        ("Retrieval", 14, False),
    ],
)
def test_sides_by_kind_of_task(part: str, tasks: int, both_sides: bool) -> None:
    found = [prompt for name, prompt in load_prompts().items() if part in name]
    assert len(found) == tasks
    for prompt in found:
        assert prompt.document == (prompt.query if both_sides else "")


def test_names_differ_by_more_than_capitals() -> None:
    names = list(load_prompts())
    assert len(names) == 67 + 1 + 9  # LLM2Vec's, CQADupstack as a whole, and the kinds
    assert len({name.casefold() for name in names}) == len(names)


def test_instructions_end_as_llm2vec_ends_them() -> None:
    for name, prompt in load_prompts().items():
        for instruction in (prompt.query, prompt.document):
            assert instruction == instruction.strip(), name
            assert instruction.endswith(":") or not instruction, name


def test_the_query_prompt_is_that_of_llm2vec_s_recipes() -> None:
    query = load_prompts()["query"].query
    assert {recipe.query_instruction for recipe in packaged_recipes().values() if recipe.adapters} == {query}


@pytest.mark.parametrize("name", ["STSBenchmark", "stsbenchmark", "STSBENCHMARK"])
def test_capitals_do_not_matter(name: str) -> None:
    assert find_prompt(load_prompts(), name).query == "Retrieve semantically similar text:"


def test_an_unknown_name_lists_close_ones() -> None:
    with pytest.raises(UnknownPrompt, match=r"no prompt named 'nfcorpos': did you mean NFCorpus\?") as error:
        find_prompt(load_prompts(), "nfcorpos")
    assert error.value.close == ("NFCorpus",)


def test_an_unknown_name_like_no_other() -> None:
    with pytest.raises(UnknownPrompt, match=r"no prompt named 'zzz'$"):
        find_prompt(load_prompts(), "zzz")
