"""The tokenizer files of a stored encoder: those of the newest stage that has any, or of the base.

tokenizer.json is used as it is, except for two changes that the official library's stack (transformers 4.44) makes
after reading it: it turns padding and truncation off, and for some tokenizer classes the flags in tokenizer_config.json
decide which special tokens stand around a text, whatever tokenizer.json says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from model_store.architectures import ARCHITECTURES
from model_store.build.checkpoints import read_raw_config
from model_store.build.sources import Source
from model_store.errors import CheckpointError
from model_store.json_text import read_json_object, reading, refuse_lfs_pointer
from model_store.manifest import TOKENIZER_FILE
from model_store.text.tokenizer import TokenizerError, special_tokens_around

_SETTINGS_FILE = "tokenizer_config.json"
_OTHER_FILES = (_SETTINGS_FILE, "special_tokens_map.json")

# Tokenizer classes that follow the flags `add_bos_token` (true by default) and `add_eos_token` (false by default) → the
# BOS and EOS that they use if no file names them.
_BY_FLAGS = {
    "LlamaTokenizer": ("<s>", "</s>"),
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
}

# A tokenizer class of a repository's own, whose code never runs, is taken to follow the flags that its file names.
_OWN_CODE = "AutoTokenizer"

# Texts that a converted tokenizer.model has to give the ids for that sentencepiece gives.
_SAMPLES = (
    "A plane is taking off, and 12 men wave.",
    "two  spaces,\ttabs\nand\r\nlines\n\n\nthen   more ",
    "def f(x): return x**2 - 3.14e-10  # naïve café ﬁne Ⅻ ½ ²",
    "Größe und Maß, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 東京 日本語, 한국어",
    "e\u0301 \u00a0 \u200b \u3000 \ufeff ▁ 🙂👩‍👩‍👧 \x01 ﷺ",
)

# Tokenizer classes that convert tokenizer.model in an older way unless `legacy` is false.
_LEGACY = ("LlamaTokenizer",)


def write_tokenizer(base: Source, stages: Sequence[Source], folder: Path) -> str:
    """Write the newest tokenizer, or convert the base's; returns the reference that it came from.

    Raises:
        CheckpointError: if there is no tokenizer, or one of its files can't be read.
    """
    for source in (*reversed(stages), base):
        if (source.folder / TOKENIZER_FILE).is_file():
            for name in _OTHER_FILES:
                if (source.folder / name).is_file():
                    _copy_without_code(source.folder / name, folder / name)
            content = read_json_object(source.folder / TOKENIZER_FILE)
            changed = _change(content, source.folder)
            if changed is None:
                shutil.copyfile(source.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
            else:
                _write_json(folder / TOKENIZER_FILE, changed)
            return source.reference
    _convert(base, folder)
    if (base.folder / "tokenizer.model").is_file():
        content = _by_legacy(read_json_object(folder / TOKENIZER_FILE), base.folder)
        content = _change(content, base.folder, by_default=True) or content
        _check_ids(Tokenizer.from_str(json.dumps(content)), base.folder)
        _write_json(folder / TOKENIZER_FILE, content)
    return f"{base.reference} (converted)"


def eos_token(folder: Path) -> str | None:
    """The end of a text that a tokenizer's files name, which need not be the one that config.json names first."""
    named = _settings(folder).get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    return token if isinstance(token, str) else None


def _change(content: dict[str, Any], folder: Path, by_default: bool = False) -> dict[str, Any] | None:
    """The tokenizer.json that the official stack works with, or None if `content` is that already.

    With `by_default` the flags have their defaults even if the files name neither a flag nor a tokenizer class.
    """
    off = {"padding": None, "truncation": None}
    plain = {**content, **off}
    with reading(folder / TOKENIZER_FILE, "is no tokenizer"):
        tokenizer = Tokenizer.from_str(json.dumps(plain))
    post_processor = _by_flags(tokenizer, folder, by_default)
    if post_processor is not None:
        return {**plain, "post_processor": post_processor}
    return plain if content.get("padding") or content.get("truncation") else None


def _by_flags(tokenizer: Tokenizer, folder: Path, by_default: bool) -> dict[str, Any] | None:
    """The post-processor that the flags ask for; None if tokenizer.json does the same, or if the flags don't count."""
    settings = _settings(folder)
    kind = _class_of(settings, folder)
    flags = settings.keys() & {"add_bos_token", "add_eos_token"}
    try:
        around = special_tokens_around(tokenizer)
    except TokenizerError:
        around = None  # tokenizer.json does something else, and the flags replace it
    if kind in _BY_FLAGS and (by_default or flags or "tokenizer_class" in settings):
        with_bos, with_eos = True, False
    elif flags and _OWN_CODE in (settings.get("auto_map") or {}):
        with_bos, with_eos = map(bool, around or ([], []))
    else:
        return None
    bos, eos = _BY_FLAGS.get(kind, (None, None))
    before = [_token(tokenizer, folder, settings, "bos_token", bos)] if settings.get("add_bos_token", with_bos) else []
    after = [_token(tokenizer, folder, settings, "eos_token", eos)] if settings.get("add_eos_token", with_eos) else []
    if around == ([number for _, number in before], [number for _, number in after]):
        return None
    single = [*(f"{token}:0" for token, _ in before), "$A:0", *(f"{token}:0" for token, _ in after)]
    pair = [*single, *(f"{token}:1" for token, _ in before), "$B:1", *(f"{token}:1" for token, _ in after)]
    carrier = Tokenizer(models.BPE())
    carrier.post_processor = processors.TemplateProcessing(single, pair, [*before, *after])
    made: dict[str, Any] = json.loads(carrier.to_str())["post_processor"]
    return made


def _token(
    tokenizer: Tokenizer, folder: Path, settings: dict[str, Any], name: str, default: str | None
) -> tuple[str, int]:
    """The token that a flag asks for, and its id."""
    named = settings.get(name, default)
    token = named.get("content") if isinstance(named, dict) else named
    token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise CheckpointError(
            f"{folder / _SETTINGS_FILE} asks for the {name} {token!r} with each text, as its tokenizer class does by "
            f"default, but {TOKENIZER_FILE} has no such token: set add_{name} to false, or name the right {name}"
        )
    return str(token), token_id


def _by_legacy(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A converted tokenizer.json as the official stack converts it, by the flag `legacy`, which is on by default.

    With it "▁" stands after every special token within a text, and without it only at the beginning of the text.
    """
    settings = _settings(folder)
    if _class_of(settings, folder) not in _LEGACY:
        return content
    prefix = settings.get("add_prefix_space") is not False
    carrier = Tokenizer(models.BPE())
    if settings.get("legacy") is False:
        carrier.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if prefix else []
        carrier.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    made = json.loads(carrier.to_str())
    return {**content, "pre_tokenizer": made["pre_tokenizer"], "normalizer": made["normalizer"]}


def _check_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare a conversion's ids with those of the tokenizer.model in `folder`: it may have left something out.

    Raises:
        CheckpointError: if they differ.
    """
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    # Without a space before a text, its first word is found behind a mark, as the tokenizer's class does it.
    mark = "" if _settings(folder).get("add_prefix_space") is not False else "<unk>"
    for text in _SAMPLES:
        expected = original.encode(mark + text)[len(original.encode(mark)) :]
        if tokenizer.encode(text, add_special_tokens=False).ids != expected:
            raise CheckpointError(
                f"{folder / 'tokenizer.model'} gives {text!r} other ids than its conversion to {TOKENIZER_FILE} does: "
                f"put a {TOKENIZER_FILE} beside the weights"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by the tokens that only the older special_tokens_map.json names."""
    found: dict[str, Any] = {}
    for name in reversed(_OTHER_FILES):
        if (folder / name).is_file():
            found |= read_json_object(folder / name)
    return found


def _class_of(settings: dict[str, Any], folder: Path) -> str:
    """The tokenizer class, without the suffix Fast; the family's own class if no file names one."""
    named = settings.get("tokenizer_class")
    family = ARCHITECTURES.get(str(read_raw_config(folder).get("model_type")))
    return str(named or (family.tokenizer_class if family else "")).removesuffix("Fast")


def _convert(base: Source, folder: Path) -> None:
    from transformers import AutoTokenizer

    gguf = next(iter(sorted(base.folder.glob("*.gguf"))), None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder,
            **({"gguf_file": gguf.name} if gguf else {}),
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # every tokenizer class fails in its own way
        for path in sorted((*base.folder.glob("*.json"), *base.folder.glob("*.model"))):
            refuse_lfs_pointer(path)
        raise CheckpointError(
            f"{base.reference} has no tokenizer.json and none can be made from it: {error}"
        ) from error
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{base.reference} has no fast tokenizer: put a tokenizer.json beside its weights")


def _copy_without_code(source: Path, target: Path) -> None:
    """Copy byte for byte, except that an auto_map is left out: a stored encoder names no remote code."""
    content = read_json_object(source)
    if content.pop("auto_map", None) is None:
        shutil.copyfile(source, target)
    else:
        _write_json(target, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
