"""Which tokenizer a stored encoder gets. Expected tokens are those of transformers 4.44.2, the official stack."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from model_store.build.build import build_encoder
from model_store.build.sources import Source
from model_store.build.tokenizer_files import write_tokenizer
from model_store.errors import CheckpointError
from model_store.recipe import recipe_from
from model_store.text.tokenizer import special_tokens_around
from tests.tiny import save_base, tiny_tokenizer

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "LlamaTokenizerFast"}
OWN_CODE = {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer"]}}
BOS, EOS = [1], [2]


def written(base: Path, out: Path) -> Tokenizer:
    out.mkdir()
    write_tokenizer(Source("base", base), [], out)
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def save_tokenizer(folder: Path, bos: bool, **settings: Any) -> None:
    folder.mkdir()
    tiny_tokenizer(bos).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("bos", "settings", "around"),
    [
        (False, {**TOKENS, "add_bos_token": True}, (BOS, [])),
        (True, {**TOKENS, "add_eos_token": True}, (BOS, EOS)),
        (True, {**TOKENS, "add_bos_token": False}, ([], [])),
        (False, {**TOKENS, "bos_token": {"content": "<bos>", "lstrip": False}}, (BOS, [])),
        (True, {**TOKENS, "tokenizer_class": "GemmaTokenizer", "add_eos_token": True}, (BOS, EOS)),
        # Other classes leave tokenizer.json alone, whatever flags there are.
        (False, {**TOKENS, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, ([], [])),
        (True, {**TOKENS, "tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True}, (BOS, [])),
        (True, {}, (BOS, [])),
        # Code of the model's own, which never runs, follows the flags that its file names: gte-Qwen2's adds EOS.
        (False, {**TOKENS, **OWN_CODE, "add_eos_token": True}, ([], EOS)),
        (True, {**TOKENS, **OWN_CODE, "add_eos_token": True}, (BOS, EOS)),
        (True, {**TOKENS, **OWN_CODE, "add_bos_token": False}, ([], [])),
        (True, {**TOKENS, **OWN_CODE}, (BOS, [])),
    ],
)
def test_special_tokens_go_by_the_flags_where_the_tokenizer_s_class_does(
    tmp_path: Path, bos: bool, settings: dict[str, Any], around: tuple[list[int], list[int]]
) -> None:
    save_tokenizer(tmp_path / "base", bos, **settings)
    tokenizer = written(tmp_path / "base", tmp_path / "out")
    assert special_tokens_around(tokenizer) == around
    assert tokenizer.encode("a plane", add_special_tokens=False).ids == tiny_tokenizer().encode("a plane").ids[1:]


def test_a_flag_without_its_token_is_named(tmp_path: Path) -> None:
    for number, bos in enumerate(("<s>", None)):
        base = tmp_path / f"base-{number}"
        save_tokenizer(base, False, **{**TOKENS, "bos_token": bos})
        with pytest.raises(
            CheckpointError, match=r"tokenizer_config\.json asks for the bos_token .* set add_bos_token to false"
        ):
            written(base, tmp_path / f"out-{number}")


def test_a_tokenizer_that_agrees_with_its_flags_is_copied_byte_for_byte(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base", True, **TOKENS)
    written(tmp_path / "base", tmp_path / "out")
    one, two = ((tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("base", "out"))
    assert one == two


@pytest.mark.parametrize("option", ["padding", "truncation"])
def test_padding_and_truncation_that_were_saved_are_off(tmp_path: Path, option: str) -> None:
    """As training scripts leave them behind."""
    tokenizer = tiny_tokenizer()
    if option == "padding":
        tokenizer.enable_padding(direction="left", pad_to_multiple_of=8, pad_token="<pad>")
    else:
        tokenizer.enable_truncation(3)
    save_base(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    build_encoder(recipe_from("x", base=str(tmp_path / "base"), dtype="float32"), tmp_path / "encoder")
    stored = Tokenizer.from_file(str(tmp_path / "encoder" / "tokenizer.json"))
    assert stored.to_str() == tiny_tokenizer().to_str()


# tokenizer.model alone, which is converted.

# What a text becomes with `legacy` on and off.
PIECES = {
    "a plane": (["▁a", "▁plane"], ["▁a", "▁plane"]),
    "  leading": (["▁", "▁", "▁le", "ading"], ["▁", "▁le", "ading"]),
    "a</s> plane": (["▁a", "</s>", "▁", "▁plane"], ["▁a", "</s>", "▁plane"]),
    "</s>plane": (["</s>", "▁plane"], ["</s>", "pl", "ane"]),
}


def save_sentencepiece(folder: Path, training: dict[str, Any] | None = None, **settings: Any) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="tokenizer.model needs sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a plane is taking off", "a man is leading a band"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **(training or {})},
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if settings:
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **settings}))


@pytest.mark.parametrize(
    ("settings", "legacy", "around"),
    [
        ({"legacy": True}, True, (BOS, [])),
        ({"legacy": False}, False, (BOS, [])),
        ({"add_eos_token": True}, True, (BOS, EOS)),
        ({"legacy": False, "add_bos_token": False}, False, ([], [])),
        ({}, True, (BOS, [])),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokenizer_model_is_converted_as_its_settings_say(
    tmp_path: Path, family: str, settings: dict[str, Any], legacy: bool, around: tuple[list[int], list[int]]
) -> None:
    save_sentencepiece(tmp_path / "base", **settings)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = written(tmp_path / "base", tmp_path / "out")
    assert special_tokens_around(tokenizer) == around
    for text, (older, newer) in PIECES.items():
        assert tokenizer.encode(text, add_special_tokens=False).tokens == (older if legacy else newer)


def test_a_git_lfs_pointer_for_tokenizer_model_is_named(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path / "base", legacy=False)
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a Git LFS pointer"):
        written(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize("training", [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}])
def test_a_conversion_that_gives_other_ids_is_refused(tmp_path: Path, training: dict[str, Any]) -> None:
    """The class converts every tokenizer.model as Llama's, whatever this one does to white space and letters."""
    save_sentencepiece(tmp_path / "base", training, legacy=True)
    with pytest.raises(CheckpointError, match=r"tokenizer.model gives .* other ids .* put a tokenizer.json beside"):
        written(tmp_path / "base", tmp_path / "out")
