"""Encoders described by sentence-transformers' files: that library's own vectors are the oracle, from raw text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from model_store.build.build import build_encoder
from model_store.build.description import DescriptionError
from model_store.build.export import export_encoder
from model_store.build.self_test import SelfTestError, write_self_test
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.errors import UserError
from model_store.manifest import read_manifest
from model_store.recipe import recipe_from
from model_store.text.tokenizer import TextTokenizer
from tests.cpus import assert_same_vectors
from tests.tiny import normalized, tiny_model, tiny_tokenizer

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is in the extra `dev`")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = ["A plane is taking off.", "the river", " Größe 東京 🙂 " * 9, "how much protein a day"]
PROMPTS = {"query": "Instruct: find the passage\nQuery:", "document": "title: none | text: ", "sts": "alike: "}

# Row: family, the configuration's own words for its attention, pooling, what stands after a text, widths of its layers.
ROWS: dict[str, tuple[str, dict[str, Any], str, bool, tuple[int, ...]]] = {
    "qwen3, causal, last token": ("qwen3", {}, "lasttoken", True, ()),
    "mistral, causal, window, last token": ("mistral", {}, "lasttoken", True, ()),
    "gemma2, causal, window, soft cap": ("gemma2", {}, "lasttoken", True, ()),
    "qwen2, bidirectional, last token": ("qwen2", {"is_causal": False}, "lasttoken", False, ()),
    "llama, bidirectional, mean": ("llama", {"is_causal": False}, "mean", False, ()),
    "qwen3, bidirectional, mean, a layer": ("qwen3", {"is_causal": False}, "mean", False, (96,)),
    "gemma3, bidirectional by its own flag, two layers": (
        *("gemma3_text", {"use_bidirectional_attention": True}, "mean", True),
        (160, 64),
    ),
    "ministral3, bidirectional, scaled queries, mean": ("ministral3", {"is_causal": False}, "mean", False, ()),
    "gemma3, causal, weighted mean": ("gemma3_text", {}, "weightedmean", False, ()),
}


def publish(folder: Path, family: str, flags: dict[str, Any], pooling: str, eos: bool, widths: tuple[int, ...]) -> Path:
    """A seeded model as its authors would publish it, by sentence-transformers' own `save`."""
    base = folder / "base"
    model = tiny_model(family)
    config = model.config.to_dict() | flags
    model.config = type(model.config).from_dict(config)
    model.save_pretrained(base)
    (base / "config.json").write_text(json.dumps(config))  # not read and written again, which halves a window
    tokenizer = tiny_tokenizer()
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )
    wrapped.save_pretrained(base)
    parts: list[Any] = [modules.Transformer(str(base), max_seq_length=512), modules.Pooling(64, pooling)]
    torch.manual_seed(0)
    for before, after in zip((64, *widths), widths, strict=False):
        parts.append(modules.Dense(before, after, activation_function=torch.nn.Identity()))
    published = st.SentenceTransformer(modules=[*parts, modules.Normalize()], prompts=PROMPTS, device="cpu")
    published.save(str(folder / "published"), create_model_card=False)
    (folder / "published" / "config.json").write_text(json.dumps(config))
    return folder / "published"


def theirs(folder: Path, texts: list[str] = TEXTS, **options: Any) -> NDArray[np.float32]:
    model = st.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    vectors: NDArray[np.float32] = model.encode(texts, **options)
    return vectors


def ours(folder: Path, instruction: str = "", texts: list[str] = TEXTS) -> NDArray[np.float32]:
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    rows = TextTokenizer.load(folder, encoder.manifest).encode_batch(texts, [instruction] * len(texts))
    return normalized(encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling))).numpy()


@pytest.mark.parametrize("row", ROWS)
def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, row: str) -> None:
    published = publish(tmp_path, *ROWS[row])
    encoder = tmp_path / "encoder"
    manifest = build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), encoder)
    assert manifest.attention == ("causal" if "causal," in row and "bidirectional" not in row else "bidirectional")
    assert manifest.width == (ROWS[row][-1] or (64,))[-1]
    expected = theirs(published)
    assert np.abs(ours(encoder) - expected).max() < 1e-5
    for role, asked in (("query", manifest.query_instruction), ("document", manifest.document_instruction)):
        by_role = theirs(published, prompt_name=role)
        assert asked == PROMPTS[role]
        assert np.abs(ours(encoder, asked) - by_role).max() < 1e-5
        assert np.abs(by_role - expected).max() > 1e-3  # a control: the prompt counts
    assert np.abs(ours(encoder, manifest.prompts["sts"]) - theirs(published, prompt_name="sts")).max() < 1e-5
    other = "causal" if manifest.attention == "bidirectional" else "bidirectional"
    if "use_bidirectional_attention" not in ROWS[row][1]:
        build_encoder(recipe_from("other", base=str(published), dtype="float32", attention=other), tmp_path / "other")
        assert np.abs(ours(tmp_path / "other") - expected).max() > 1e-3  # a control: the direction counts


@pytest.mark.parametrize("eos", [False, True])
def test_prompts_left_out_of_pooling(tmp_path: Path, eos: bool) -> None:
    published = publish(tmp_path, "mistral", {"is_causal": False, "sliding_window": None}, "mean", eos, ())
    included = theirs(published, prompt_name="query")
    changed(published, "1_Pooling/config.json", lambda found: {**found, "include_prompt": False})
    manifest = build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    assert np.abs(ours(tmp_path / "encoder") - theirs(published)).max() < 1e-5
    for role, asked in (("query", manifest.query_instruction), ("document", manifest.document_instruction)):
        assert np.abs(ours(tmp_path / "encoder", asked) - theirs(published, prompt_name=role)).max() < 1e-5
    assert np.abs(ours(tmp_path / "encoder", manifest.query_instruction) - included).max() > 1e-3  # a control
    export_encoder(tmp_path / "encoder", tmp_path / "out")
    expected = theirs(published, prompt_name="query")
    assert np.abs(theirs(tmp_path / "out", prompt_name="query") - expected).max() < 1e-5


@pytest.mark.parametrize("row", ["qwen3, causal, last token", "qwen3, bidirectional, mean, a layer"])
def test_a_text_has_the_same_bits_alone_and_among_64(tmp_path: Path, row: str) -> None:
    published = publish(tmp_path, *ROWS[row])
    build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    others = [f"sentence {number} " * (number % 7 + 1) for number in range(64)]
    among = ours(tmp_path / "encoder", texts=[*others[:31], TEXTS[0], *others[31:]])[31]
    alone = ours(tmp_path / "encoder", texts=TEXTS[:1])[0]
    assert_same_vectors(alone, among, "float32")


def changed(published: Path, name: str, change: Any) -> None:
    path = published / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a module of another package": (
        *("modules.json", lambda all_: [*all_, {"idx": 9, "name": "9", "path": "", "type": "custom_st.Normalizer"}]),
        r"modules.json has the module custom_st.Normalizer, which is not reproduced",
    ),
    "a module that is not known": (
        *("modules.json", lambda all_: [all_[0], {**all_[1], "type": "sentence_transformers.models.WeightedLayer"}]),
        r"module sentence_transformers.models.WeightedLayer, which is not reproduced",
    ),
    "modules in another order": ("modules.json", lambda all_: all_[:1], r"has the modules Transformer: an encoder has"),
    "no list of modules": ("modules.json", lambda all_: {"a": 1}, r"modules.json is no list of modules"),
    "a pooling that is not known": (
        *("1_Pooling/config.json", lambda _: {"pooling_mode": "max"}),
        r"config.json asks for pooling_mode 'max', which is not reproduced",
    ),
    "two poolings": (
        "1_Pooling/config.json",
        lambda _: {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True, "word_embedding_dimension": 64},
        r"asks for 2 poolings \(last_token, mean\)",
    ),
    "prompts left out of a pooling that numbers their tokens": (
        *("1_Pooling/config.json", lambda _: {"pooling_mode": "weightedmean", "include_prompt": False}),
        r"asks for include_prompt False of weighted_mean pooling, which is not reproduced",
    ),
    "lower case": (
        *("sentence_bert_config.json", lambda found: {**found, "do_lower_case": True}),
        r"asks for do_lower_case True, which is not reproduced",
    ),
    "a setting that is not known": (
        *("config_sentence_transformers.json", lambda found: {**found, "truncate_dim": 32}),
        r"has the setting truncate_dim \(32\), which is not reproduced",
    ),
    "an activation": (
        *("2_Dense/config.json", lambda found: {**found, "activation_function": "torch.nn.modules.activation.Tanh"}),
        r"asks for activation_function 'torch.nn.modules.activation.Tanh', which is not reproduced",
    ),
    "a default prompt that is not there": (
        *("config_sentence_transformers.json", lambda found: {**found, "default_prompt_name": "x"}),
        r"the default_prompt_name 'x', which is none of its prompts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_reproduced_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    published = publish(tmp_path, "llama", {}, "mean", False, (32,))
    name, change, message = REFUSED[case]
    changed(published, name, change)
    with pytest.raises(UserError, match=message):
        build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_widths_that_the_configuration_names(tmp_path: Path) -> None:
    published = publish(tmp_path, "qwen3", {}, "lasttoken", False, ())
    changed(published, "config.json", lambda found: {**found, "matryoshka_dimensions": [32, 16]})
    recipe = recipe_from("encoder", base=str(published), dtype="float32")
    assert build_encoder(recipe, tmp_path / "encoder").widths == (16, 32, 64)
    changed(published, "config.json", lambda found: {**found, "matryoshka_dimensions": "32"})
    with pytest.raises(UserError, match=r"config.json has matryoshka_dimensions '32', which are no widths"):
        build_encoder(recipe, tmp_path / "other")


def test_two_descriptions_are_refused(tmp_path: Path) -> None:
    published = publish(tmp_path, "llama", {}, "mean", False, ())
    (published / "llm2vec_config.json").write_text("{}\n")
    (published / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')
    with pytest.raises(DescriptionError, match=r"modules.json and llm2vec_config.json, .* remove one"):
        build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")


def test_a_recipe_wins_over_the_files(tmp_path: Path) -> None:
    published = publish(tmp_path, "llama", {}, "mean", False, ())
    recipe = recipe_from(
        "encoder", base=str(published), dtype="float32", pooling="last_token", query_instruction="find"
    )
    build_encoder(recipe, tmp_path / "encoder")
    manifest = read_manifest(tmp_path / "encoder")
    assert (manifest.pooling, manifest.query_instruction, manifest.attention) == ("last_token", "find", "causal")


def test_a_name_that_stands_for_bidirectional_attention(tmp_path: Path) -> None:
    """transformers does not know the name: the same model under the name that it knows is the oracle."""
    published = publish(tmp_path, "llama", {"is_causal": False}, "mean", False, ())
    expected = theirs(published)
    changed(published, "config.json", lambda found: {**found, "model_type": "llama_bidirec", "pooling": "avg"})
    changed(published, "config.json", lambda found: {key: found[key] for key in found.keys() - {"is_causal"}})
    manifest = build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    assert (manifest.attention, manifest.model_type) == ("bidirectional", "llama")
    assert np.abs(ours(tmp_path / "encoder") - expected).max() < 1e-5


def test_the_published_checkpoint_itself_is_the_self_test_s_second_opinion(tmp_path: Path) -> None:
    """A stored encoder whose window is not the published one's agrees with itself alone."""
    published = publish(tmp_path, *ROWS["gemma3, bidirectional by its own flag, two layers"])
    build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    write_self_test(tmp_path / "encoder", published)
    changed(published, "config.json", lambda found: {**found, "sliding_window": found["sliding_window"] + 2})
    write_self_test(tmp_path / "encoder")
    with pytest.raises(SelfTestError, match="differs from that of the published checkpoint"):
        write_self_test(tmp_path / "encoder", published)


def test_attention_that_only_code_of_the_model_s_own_knows_has_to_be_named(tmp_path: Path) -> None:
    published = publish(tmp_path, "qwen2", {}, "lasttoken", False, ())
    changed(published, "config.json", lambda found: {**found, "auto_map": {"AutoModel": "modeling_own.OwnModel"}})
    with pytest.raises(DescriptionError, match=r"names code of the model's own, .* name the attention in a recipe"):
        build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    recipe = recipe_from("encoder", base=str(published), dtype="float32", attention="bidirectional")
    assert build_encoder(recipe, tmp_path / "encoder").attention == "bidirectional"
