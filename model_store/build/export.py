"""A stored encoder as a folder of stock parts, which sentence-transformers opens without this package.

Stock modules pool whole rows and put a prompt before the text as it is. An encoder that needs more than that, as most
of LLM2Vec's do, is refused with what it needs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from model_store.build.description import MODULES_FILE, POOLING_FLAGS
from model_store.encoder.head import Head
from model_store.errors import UserError
from model_store.json_text import read_json_object
from model_store.manifest import CONFIG_FILE, TOKENIZER_FILE, Manifest, StoreError, changed_files, read_manifest
from model_store.text.tokenizer import special_tokens_around

_OF_ONE_TOKEN = ("last_token", "eos_token", "bos_token")


class ExportError(UserError):
    """An encoder that stock modules can't be: the message says what they lack."""


def export_encoder(folder: Path, out: Path) -> None:
    """Write the encoder in `folder` to `out`, which must not be there or be empty.

    Raises:
        StoreError: if `folder` holds no whole stored encoder.
        ExportError: if stock modules would give other vectors, or `out` holds something.
    """
    manifest = read_manifest(folder)
    if differences := changed_files(folder, manifest):
        raise StoreError(f"{folder} is damaged: {differences[0]}")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    if lacks := _lacks(manifest, tokenizer):
        raise ExportError(f"stock modules can't be {manifest.name}: {lacks}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there already and not empty: choose another place or remove it")
    out.mkdir(parents=True, exist_ok=True)
    for name in manifest.files:
        if (name.startswith("model") and name != MODULES_FILE) or name in (CONFIG_FILE, TOKENIZER_FILE):
            shutil.copyfile(folder / name, out / name)
    _write(out / "tokenizer_config.json", _tokenizer_settings(folder, manifest, tokenizer))
    _write(out / "sentence_bert_config.json", {"max_seq_length": manifest.max_positions, "do_lower_case": False})
    _write(out / "config_sentence_transformers.json", _prompts(manifest))
    width = read_json_object(folder / CONFIG_FILE)["hidden_size"]
    pooling = "last_token" if manifest.pooling == "eos_token" else manifest.pooling
    behind: dict[str, dict[str, object]] = {
        "Pooling": {
            "word_embedding_dimension": width,
            **{flag: mode == pooling for flag, mode in POOLING_FLAGS.items()},
            "include_prompt": pooling in _OF_ONE_TOKEN or not manifest.skip_instruction,
        }
    }
    head = Head.read(folder)
    if head:
        sizes = {"in_features": width, "out_features": manifest.width, "bias": True}
        behind["Dense"] = {**sizes, "activation_function": "torch.nn.modules.linear.Identity"}
    behind["Normalize"] = {}
    places = {"Transformer": "", **{kind: f"{number}_{kind}" for number, kind in enumerate(behind, 1)}}
    for kind, settings in behind.items():
        (out / places[kind]).mkdir()
        if settings:
            _write(out / places[kind] / "config.json", settings)
    if head:
        tensors = {"linear.weight": head.weight, "linear.bias": head.bias}
        save_file(tensors, out / places["Dense"] / "model.safetensors")
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(places.items())
    ]
    _write(out / MODULES_FILE, modules)


def _lacks(manifest: Manifest, tokenizer: Tokenizer) -> str:
    """What the encoder does that stock modules don't; "" if there is nothing."""
    template = manifest.template
    if template.prefix or template.suffix or template.strip:
        return f"it puts {template.prefix!r} before each text and {template.suffix!r} after it"
    if template.bare_lead or template.trail:
        return "what it puts around a text with an instruction is more than a prompt before it"
    before, _ = special_tokens_around(tokenizer)
    stock_span = manifest.span_count == "prompt" and manifest.pooling == "mean"
    if manifest.skip_instruction and manifest.pooling not in _OF_ONE_TOKEN and not stock_span:
        return (
            "it leaves instructions out of pooling"
            + (", and the special tokens before each text too" if before else "")
            + ", and they pool the whole row"
        )
    return ""


def _prompts(manifest: Manifest) -> dict[str, object]:
    roles = {"query": manifest.query_instruction, "document": manifest.document_instruction}
    placed = {role: manifest.template.before_text(instruction) for role, instruction in roles.items()}
    return {
        "prompts": {**manifest.prompts, **placed},
        "default_prompt_name": manifest.default_prompt or None,
        "similarity_fn_name": "cosine",
    }


def _tokenizer_settings(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> dict[str, object]:
    """tokenizer_config.json of a class that uses tokenizer.json as it is; others would change some ids."""
    path = folder / "tokenizer_config.json"
    known = read_json_object(path) if path.is_file() else {}
    named = {name: known[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if known.get(name)}
    if "pad_token" not in named:  # what fills up a row is masked, so any token will do
        named["pad_token"] = named.get("eos_token") or tokenizer.id_to_token(0)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": manifest.max_positions,
        "padding_side": "right",
        **named,
    }


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
