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
from numpy.typing import NDArray
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


# Our vectors and sentence-transformers' of the same texts: first without a prompt, last with that of queries.
Pairs = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


def built(name: str, published: Path, encoder: Path, **changes: Any) -> Manifest:
    """The encoder of a recipe on another base, without the widths for which a tiny model is too small."""
    changes = {"base": str(published), "dtype": "float32", "widths": (), **changes}
    return build_encoder(load_recipe(name).model_copy(update=changes), encoder)


def vectors_of(case: str, folder: Path) -> Pairs:
    """Of a recipe's encoder."""
    if case in OTHERS:
        return OTHERS[case](folder)
    layout, encoder = LAYOUTS[case], folder / "encoder"
    published = publish(folder, layout.family, layout.flags, layout.pooling, False, layout.widths)
    changed(published, "config_sentence_transformers.json", lambda found: {**found, "prompts": layout.prompts})
    if "<|endoftext|>" in layout.row:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (published / name).write_text((published / name).read_text().replace("<eos>", "<|endoftext|>"))
    tokenize(published, layout.row)
    expected = {prompt: theirs(published, prompt=prompt) for prompt in ("", layout.document, layout.query)}
    layout.as_published(published)
    manifest = built(case.split(",")[0], published, encoder)
    assert (manifest.query_instruction, manifest.document_instruction) == (layout.query, layout.document)
    return [(ours(encoder, prompt), vectors) for prompt, vectors in expected.items()]


def gritlm(folder: Path) -> Pairs:
    """What stands before a text is left out of pooling."""
    published = publish(folder, "mistral", {**BOTH, "sliding_window": None}, "mean", True, ())
    changed(published, "1_Pooling/config.json", lambda found: {**found, "include_prompt": False})
    task = load_recipe("gritlm-7b").query_instruction
    prompts = {"": "<|embed|>\n", task: f"<|user|>\n{task}\n<|embed|>\n"}
    expected = {given: theirs(published, prompt=prompt) for given, prompt in prompts.items()}
    remove_files(published)
    built("gritlm-7b", published, folder / "encoder")
    return [(ours(folder / "encoder", given), vectors) for given, vectors in expected.items()]


def bge_en_icl(folder: Path) -> Pairs:
    """A mark stands behind queries, and a text's end is marked whether the tokenizer does it or not."""
    published = publish(folder, "mistral", {}, "lasttoken", False, ())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published / name).write_text((published / name).read_text().replace("<eos>", "</s>"))
    tokenize(published, "<bos> $A </s>")
    task = load_recipe("bge-en-icl").query_instruction
    queries = [f"<instruct>{task}\n<query>{text}\n<response>" for text in TEXTS]
    expected = {"": theirs(published), task: theirs(published, queries)}
    pairs = []
    for name, row in (("with-end", "<bos> $A </s>"), ("without-end", "<bos> $A")):
        tokenize(published, row)
        built("bge-en-icl", published, folder / name)
        pairs += [(ours(folder / name, given), vectors) for given, vectors in expected.items()]
    return pairs


def voyage(folder: Path) -> Pairs:
    """The model is its own code: in the oracle its linear layer stands behind pooling."""
    published = publish(folder, "qwen3", BOTH, "mean", False, (96,))
    layer = load_file(published / "2_Dense" / "model.safetensors")["linear.weight"]
    save_file({"linear.weight": layer, "linear.bias": torch.zeros(96)}, published / "2_Dense" / "model.safetensors")
    expected = [theirs(published, prompt_name=role) for role in (None, "document", "query")]
    tensors = {f"model.{name}": tensor for name, tensor in load_file(published / "model.safetensors").items()}
    save_file({**tensors, "linear.weight": layer}, published / "model.safetensors")
    changed(published, "modules.json", lambda all_: [*all_[:2], {**all_[3], "idx": 2}])
    own = {"auto_map": {"AutoModel": "own.Qwen3BidirectionalModel"}, "use_bidirectional_attention": True}
    changed(published, "config.json", lambda found: {**found, **own, "num_labels": 96, "is_causal": None})
    manifest = built("voyage-4-nano", published, folder / "encoder", widths=(32, 96))
    assert (manifest.attention, manifest.width, manifest.widths) == ("bidirectional", 96, (32, 96))
    prompts = ("", manifest.document_instruction, manifest.query_instruction)
    return [(ours(folder / "encoder", prompt), vectors) for prompt, vectors in zip(prompts, expected, strict=True)]


OTHERS: dict[str, Callable[[Path], Pairs]] = {"gritlm-7b": gritlm, "bge-en-icl": bge_en_icl, "voyage-4-nano": voyage}


@pytest.mark.parametrize("case", [*LAYOUTS, *OTHERS])
def test_vectors_of_a_recipe_are_those_of_sentence_transformers(tmp_path: Path, case: str) -> None:
    pairs = vectors_of(case, tmp_path)
    for mine, expected in pairs:
        assert np.abs(mine - expected).max() < 1e-5
    assert np.abs(pairs[0][1] - pairs[-1][1]).max() > 1e-3  # a control: the prompt counts


def test_what_gritlm_leaves_out_is_counted_by_the_prompt(tmp_path: Path) -> None:
    expected = gritlm(tmp_path)[-1][1]
    built("gritlm-7b", tmp_path / "published", tmp_path / "by-text", span_count="text")
    query = load_recipe("gritlm-7b").query_instruction
    assert np.abs(ours(tmp_path / "by-text", query) - expected).max() > 1e-3


def test_a_linear_layer_among_the_decoder_s_tensors_has_to_be_named_right(tmp_path: Path) -> None:
    voyage(tmp_path)
    for name, message in (
        ("", r"holds linear\.weight, .* a recipe's head_tensor may name"),
        ("linear.x", "lacks linear.x"),
    ):
        with pytest.raises(BuildError, match=message):
            built("voyage-4-nano", tmp_path / "published", tmp_path / "other", head_tensor=name)


def test_a_recipe_that_leaves_the_description_to_files_needs_them(tmp_path: Path) -> None:
    published = publish(tmp_path, "qwen3", {}, "lasttoken", False, ())
    remove_files(published)
    with pytest.raises(BuildError, match=r"the recipe qwen3-embedding-0\.6b leaves it to files such as modules\.json"):
        built("qwen3-embedding-0.6b", published, tmp_path / "encoder")


def test_every_recipe_that_is_not_llm2vec_s_is_compared_or_asks_for_what_one_that_is_asks_for() -> None:
    compared = {case.split(",")[0] for case in (*LAYOUTS, *OTHERS)}
    assert compared | set(SAME) == {name for name, recipe in packaged_recipes().items() if not recipe.adapters}
    for name, kind in SAME.items():
        one, other = (load_recipe(found).model_copy(update={"base": ""}).fingerprint for found in (name, kind))
        assert one == other, name
