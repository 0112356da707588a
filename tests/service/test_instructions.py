"""The instructions of encoders that describe their own: both roles, prompts by name, and a default."""

from __future__ import annotations

from typing import Any

import pytest

from model_store.templates import VERBATIM, Template
from service.embedding.instructions import Instructions, load_instructions
from service.errors import InvalidRequest
from service.settings import Settings
from tests.service.fakes import fake_manifest

OWN: dict[str, Any] = {
    "template": Template(lead=VERBATIM),
    "query_instruction": "query: ",
    "document_instruction": "passage: ",
    "prompts": {"query": "query: ", "document": "passage: ", "Clustering": "cluster: "},
}


def instructions(settings: Settings | None = None, **described: Any) -> Instructions:
    return load_instructions(settings or Settings(), fake_manifest().model_copy(update=described))


def test_both_roles_have_their_own() -> None:
    known = instructions(**OWN)
    assert known.choose(names={"input_type": "search_query"}).text == "query: "
    assert known.choose(names={"input_type": "passage"}).text == "passage: "
    assert known.choose(alias="document").text == "passage: "
    assert known.choose(names={"prompt_name": "clustering"}).text == "cluster: "
    assert known.choose().text == ""


def test_documents_of_llm2vec_have_none() -> None:
    known = instructions()
    assert known.choose(names={"input_type": "document"}).text == ""
    assert known.choose(names={"prompt_name": "sts"}).text == "Retrieve semantically similar text:"


def test_a_text_without_a_role_gets_the_encoder_s_default_unless_a_setting_names_another() -> None:
    known = instructions(**OWN, default_prompt="document")
    assert known.choose() == ("passage: ", "default")
    assert known.choose(names={"input_type": "query"}).text == "query: "
    known = instructions(Settings(default_input_type="query"), **OWN, default_prompt="document")
    assert known.choose().text == "query: "


@pytest.mark.parametrize("default", ["", "query", "document", "Clustering"])
def test_evaluation_in_this_process_has_the_instructions_of_the_server(default: str) -> None:
    manifest = fake_manifest().model_copy(update={**OWN, "default_prompt": default})
    known = load_instructions(Settings(), manifest)
    assert manifest.instruction_of() == known.choose().text
    assert (manifest.instruction_of("query"), manifest.instruction_of("document")) == ("query: ", "passage: ")
    assert bool(default) == bool(manifest.instruction_of())


def test_prompts_written_for_llm2vec_are_not_offered_for_another_encoder() -> None:
    with pytest.raises(InvalidRequest, match="there is no prompt_name 'sts'"):
        instructions(**OWN).choose(names={"prompt_name": "sts"})
