"""The packaged recipes that are not LLM2Vec's, each on a seeded checkpoint in the layout of its published model.

sentence-transformers' vectors are the oracle. It gets the checkpoint with what only code of the model's own does
(attention in both directions, the mark of a text's end) in the words that transformers knows. Then the files are
changed to the published layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from model_store.build.build import BuildError, build_encoder
from model_store.manifest import Manifest
from model_store.recipe import load_recipe, packaged_recipes
from tests.model_store.test_description import TEXTS, changed, ours, publish, theirs

INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
BGE = "<instruct>Given a web search query, retrieve relevant passages that answer the query.\n<query>"
BOTH = {"is_causal": False}


@dataclass(frozen=True)
class Layout:
    """`row` holds the tokens around a text; `prompts` are those of the files, `query` and `document` those expected."""

    family: str
    pooling: str
    query: str
    document: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    row: str = "<bos> $A"
    as_published: Callable[[Path], None] = lambda published: None


def tokenize(published: Path, row: str) -> None:
    tokenizer = Tokenizer.from_file(str(published / "tokenizer.json"))
    around = [(token, tokenizer.token_to_id(token)) for token in row.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=row, special_tokens=around)
    tokenizer.save(str(published / "tokenizer.json"))


def named_llama_bidirec(published: Path) -> None:
    own = {"model_type": "llama_bidirec", "pooling": "avg", "auto_map": {"AutoModel": "own.LlamaBidirectionalModel"}}
    changed(published, "config.json", lambda found: {**found, **own, "is_causal": None})


def without_files(published: Path) -> None:
    named_llama_bidirec(published)
    remove_files(published)


def remove_files(published: Path) -> None:
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (published / name).unlink()
    shutil.rmtree(published / "1_Pooling")


def end_by_flag(tokenizer_class: str) -> Callable[[Path], None]:
    """tokenizer_config.json asks for the end's mark, and tokenizer.json adds <bos> alone."""
    flags = {"tokenizer_class": tokenizer_class, "add_bos_token": True, "add_eos_token": True}

    def change(published: Path) -> None:
        tokenize(published, "<bos> $A")
        changed(published, "tokenizer_config.json", lambda found: {**found, **flags})

    return change


def end_by_own_code(published: Path) -> None:
    tokenize(published, "$A")
    own = {"AutoModel": "modeling_qwen.Qwen2Model"}
    changed(published, "config.json", lambda found: {**found, "auto_map": own, "is_causal": None})


def end_by_own_code_and_flag(published: Path) -> None:
    end_by_own_code(published)
    own = {"add_eos_token": True, "auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]}}
    changed(published, "tokenizer_config.json", lambda found: {**found, **own})


def without_longest(published: Path) -> None:
    (published / "sentence_bert_config.json").unlink()


# By the recipe's name; behind a comma stands what the layout has besides.
LAYOUTS = {
    "llama-nemotron-embed-1b-v2": Layout(
        *("llama", "mean", "query: ", "passage: "), flags=BOTH, as_published=without_files
    ),
    "llama-nemotron-embed-1b-v2, with files": Layout(
        *("llama", "mean", "query: ", "passage: "), flags=BOTH, as_published=named_llama_bidirec
    ),
    "llama-embed-nemotron-8b": Layout(
        *("llama", "mean", "Instruct: Given a question, retrieve passages that answer the question\nQuery: "),
        flags=BOTH,
        as_published=without_files,
    ),
    "nemotron-3-embed-1b": Layout(
        *("ministral3", "mean", "query: ", "passage: ", {"query": "query: ", "document": "passage: "}), flags=BOTH
    ),
    "embeddinggemma-300m": Layout(
        *("gemma3_text", "mean", "task: search result | query: ", "title: none | text: "),
        prompts={"query": "task: search result | query: ", "document": "title: none | text: ", "STS": "task: alike | "},
        flags={"use_bidirectional_attention": True},
        widths=(160, 64),
        row="<bos> $A <eos>",
    ),
    "jina-embeddings-v5-text-small-retrieval": Layout(
        *("qwen3", "lasttoken", "Query: ", "Document: ", {"query": "Query: ", "document": "Document: "}), row="$A"
    ),
    "gte-qwen2-7b-instruct": Layout(
        *("qwen2", "lasttoken", f"{INSTRUCT} ", "", {"query": f"{INSTRUCT} "}),
        flags=BOTH,
        row="$A <|endoftext|>",
        as_published=end_by_own_code,
    ),
    "gte-qwen2-7b-instruct, with a flag": Layout(
        *("qwen2", "lasttoken", f"{INSTRUCT} ", "", {"query": f"{INSTRUCT} "}),
        flags=BOTH,
        row="$A <|endoftext|>",
        as_published=end_by_own_code_and_flag,
    ),
    "qwen3-embedding-0.6b": Layout(
        *("qwen3", "lasttoken", INSTRUCT, "", {"query": INSTRUCT, "document": ""}), row="$A <|endoftext|>"
    ),
    "harrier-oss-v1-0.6b": Layout(
        *("qwen3", "lasttoken", f"{INSTRUCT} ", "", {"web_search_query": f"{INSTRUCT} ", "sts_query": "Instruct: x"}),
        row="$A <|endoftext|>",
        as_published=without_longest,
    ),
    "harrier-oss-v1-270m": Layout(
        *("gemma3_text", "lasttoken", f"{INSTRUCT} ", "", {"web_search_query": f"{INSTRUCT} "}),
        row="<bos> $A <eos>",
        as_published=without_longest,
    ),
    "e5-mistral-7b-instruct": Layout(
        *("mistral", "lasttoken", f"{INSTRUCT} ", "", {"web_search_query": f"{INSTRUCT} ", "sts_query": "Instruct: x"}),
        row="<bos> $A <eos>",
        as_published=end_by_flag("LlamaTokenizer"),
    ),
    "linq-embed-mistral": Layout(
        *("mistral", "lasttoken", f"{INSTRUCT} "), row="<bos> $A <eos>", as_published=end_by_flag("LlamaTokenizer")
    ),
    "bge-multilingual-gemma2": Layout(
        *("gemma2", "lasttoken", BGE),
        row="<bos> $A <eos>",
        as_published=end_by_flag("GemmaTokenizer"),
    ),
}

# Other recipes of a kind → the one of that kind that is compared.
SAME = {
    "llama-3.2-nv-embedqa-1b-v2": "llama-nemotron-embed-1b-v2",
    "nemotron-3-embed-8b": "nemotron-3-embed-1b",
    "gte-qwen2-1.5b-instruct": "gte-qwen2-7b-instruct",
    "qwen3-embedding-4b": "qwen3-embedding-0.6b",
    "qwen3-embedding-8b": "qwen3-embedding-0.6b",
    "harrier-oss-v1-27b": "harrier-oss-v1-270m",
    "sfr-embedding-mistral": "linq-embed-mistral",
    "sfr-embedding-2_r": "linq-embed-mistral",
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_vectors_of_a_recipe_are_those_of_sentence_transformers(tmp_path: Path, case: str) -> None:
    layout, encoder = LAYOUTS[case], tmp_path / "encoder"
    published = publish(tmp_path, layout.family, layout.flags, layout.pooling, False, layout.widths)
    changed(published, "config_sentence_transformers.json", lambda found: {**found, "prompts": layout.prompts})
    if "<|endoftext|>" in layout.row:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (published / name).write_text((published / name).read_text().replace("<eos>", "<|endoftext|>"))
    tokenize(published, layout.row)
    expected = {prompt: theirs(published, prompt=prompt) for prompt in ("", layout.query, layout.document)}
    layout.as_published(published)
    manifest = built(case.split(",")[0], published, encoder)
    assert (manifest.query_instruction, manifest.document_instruction) == (layout.query, layout.document)
    for prompt, vectors in expected.items():
        assert np.abs(ours(encoder, prompt) - vectors).max() < 1e-5
    assert np.abs(expected[layout.query] - expected[""]).max() > 1e-3  # a control: the prompt counts


def built(name: str, published: Path, encoder: Path, **changes: Any) -> Manifest:
    """The encoder of a recipe on another base, and for what a tiny model is too small."""
    changes = {"base": str(published), "dtype": "float32", "widths": (), **changes}
    return build_encoder(load_recipe(name).model_copy(update=changes), encoder)


def test_gritlm_leaves_what_stands_before_a_text_out_of_pooling(tmp_path: Path) -> None:
    published = publish(tmp_path, "mistral", {**BOTH, "sliding_window": None}, "mean", True, ())
    changed(published, "1_Pooling/config.json", lambda found: {**found, "include_prompt": False})
    task = load_recipe("gritlm-7b").query_instruction
    query = theirs(published, prompt=f"<|user|>\n{task}\n<|embed|>\n")
    document = theirs(published, prompt="<|embed|>\n")
    remove_files(published)
    built("gritlm-7b", published, tmp_path / "encoder")
    assert np.abs(ours(tmp_path / "encoder", task) - query).max() < 1e-5
    assert np.abs(ours(tmp_path / "encoder") - document).max() < 1e-5
    built("gritlm-7b", published, tmp_path / "by-text", span_count="text")
    assert np.abs(ours(tmp_path / "by-text", task) - query).max() > 1e-3  # a control


def test_bge_en_icl_has_a_mark_behind_queries(tmp_path: Path) -> None:
    published = publish(tmp_path, "mistral", {}, "lasttoken", False, ())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published / name).write_text((published / name).read_text().replace("<eos>", "</s>"))
    tokenize(published, "<bos> $A </s>")
    task = load_recipe("bge-en-icl").query_instruction
    query = theirs(published, [f"<instruct>{task}\n<query>{text}\n<response>" for text in TEXTS])
    document = theirs(published)
    for name, row in (("with-end", "<bos> $A </s>"), ("without-end", "<bos> $A")):
        tokenize(published, row)
        manifest = built("bge-en-icl", published, tmp_path / name)
        assert np.abs(ours(tmp_path / name, manifest.query_instruction) - query).max() < 1e-5
        assert np.abs(ours(tmp_path / name) - document).max() < 1e-5


def test_voyage_4_nano_has_its_linear_layer_among_the_decoder_s_tensors(tmp_path: Path) -> None:
    """Its model is its own code: in the oracle the same layer stands behind pooling."""
    published = publish(tmp_path, "qwen3", BOTH, "mean", False, (96,))
    own = {"auto_map": {"AutoModel": "own.Qwen3BidirectionalModel"}, "use_bidirectional_attention": True}
    tensors = {f"model.{name}": tensor for name, tensor in load_file(published / "model.safetensors").items()}
    layer = load_file(published / "2_Dense" / "model.safetensors")["linear.weight"]
    save_file({"linear.weight": layer, "linear.bias": torch.zeros(96)}, published / "2_Dense" / "model.safetensors")
    query, document = (theirs(published, prompt_name=role) for role in ("query", "document"))
    save_file({**tensors, "linear.weight": layer}, published / "model.safetensors")
    changed(published, "modules.json", lambda all_: [*all_[:2], {**all_[3], "idx": 2}])
    changed(published, "config.json", lambda found: {**found, **own, "num_labels": 96, "is_causal": None})
    with pytest.raises(BuildError, match=r"holds linear\.weight, .* a recipe's head_tensor may name a linear layer"):
        built("voyage-4-nano", published, tmp_path / "encoder", head_tensor="")
    with pytest.raises(BuildError, match=r"lacks linear\.wieght"):
        built("voyage-4-nano", published, tmp_path / "encoder", head_tensor="linear.wieght")
    manifest = built("voyage-4-nano", published, tmp_path / "encoder", widths=(32, 96))
    assert (manifest.attention, manifest.width, manifest.widths) == ("bidirectional", 96, (32, 96))
    assert np.abs(ours(tmp_path / "encoder", manifest.query_instruction) - query).max() < 1e-5
    assert np.abs(ours(tmp_path / "encoder", manifest.document_instruction) - document).max() < 1e-5


def test_a_recipe_that_leaves_the_description_to_files_needs_them(tmp_path: Path) -> None:
    published = publish(tmp_path, "qwen3", {}, "lasttoken", False, ())
    remove_files(published)
    with pytest.raises(BuildError, match=r"the recipe qwen3-embedding-0\.6b leaves it to files such as modules\.json"):
        built("qwen3-embedding-0.6b", published, tmp_path / "encoder")


def test_every_recipe_that_is_not_llm2vec_s_is_compared_or_asks_for_what_one_that_is_asks_for() -> None:
    compared = {case.split(",")[0] for case in LAYOUTS} | {"gritlm-7b", "bge-en-icl", "voyage-4-nano"}
    assert compared | set(SAME) == {name for name, recipe in packaged_recipes().items() if not recipe.adapters}
    for name, kind in SAME.items():
        one, other = (load_recipe(found).model_copy(update={"base": ""}).fingerprint for found in (name, kind))
        assert one == other, name
