"""What the files beside a base's weights say of how it attends, pools and projects, in the words of a manifest.

Two kinds of files say it: sentence-transformers' (`modules.json` and the folders that it names) and the official
LLM2Vec library's (`llm2vec_config.json`), to which training adds a file of its own. Whatever they name is reproduced,
or refused by its name: what this module does not know would be left out of the encoder, and its vectors would be wrong
without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import TypeAdapter

from model_store.architectures import BIDIRECTIONAL_NAMES, Attention
from model_store.build.checkpoints import load_tensors, read_raw_config
from model_store.build.sources import Source
from model_store.encoder.head import Head
from model_store.errors import UserError
from model_store.json_text import parse_json, read_json_object, reading
from model_store.recipe import RecipeError, Widths, recipe_from
from model_store.templates import VERBATIM, Template

MODULES_FILE = "modules.json"

# What training writes beside an adapter: the attention and the widths that it was trained for.
TRAINED_FILE = "encoder_config.json"

# A stored encoder opens in sentence-transformers through this module: it says nothing of the base.
OWN_MODULE = "model_store.sentence_transformers_module.StoredEncoderModule"

# The names of modules that are reproduced, whatever package of sentence-transformers they come from.
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")

# sentence-transformers' poolings, by the name of their old flag and by their new name → ours.
POOLING_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last_token",
    "pooling_mode_cls_token": "bos_token",
}
_POOLINGS = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last_token", "cls": "bos_token"}

# Poolings from which the prompt can be left out; sentence-transformers' others number its tokens all the same.
_WITHOUT_PROMPT = ("mean", "last_token")

# Keys of each file → the values that are reproduced; None stands for any value.
_ANY = None
_TRANSFORMER: dict[str, tuple[Any, ...] | None] = {
    "max_seq_length": _ANY,
    "do_lower_case": (False, None),
    "transformer_task": ("feature-extraction", None),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}}, None),
    "module_output_name": ("token_embeddings", None),
    "processing_kwargs": ({}, None),
    "unpad_inputs": _ANY,
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "model_args": ({}, {"trust_remote_code": True}, None),
    "tokenizer_args": ({}, {"trust_remote_code": True}, None),
    "config_args": ({}, {"trust_remote_code": True}, None),
}
_POOLING: dict[str, tuple[Any, ...] | None] = {
    "word_embedding_dimension": _ANY,
    "embedding_dimension": _ANY,
    "include_prompt": (True, False),
    "pooling_mode": tuple(_POOLINGS),
    "pooling_mode_max_tokens": (False,),
    "pooling_mode_mean_sqrt_len_tokens": (False,),
    **dict.fromkeys(POOLING_FLAGS, (True, False)),
}
_DENSE: dict[str, tuple[Any, ...] | None] = {
    "in_features": _ANY,
    "out_features": _ANY,
    "bias": (True, False),
    "activation_function": ("torch.nn.modules.linear.Identity", "torch.nn.Identity"),
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
    "use_residual": (False, None),
}
_PROMPTS: dict[str, tuple[Any, ...] | None] = {
    "__version__": _ANY,
    "model_type": ("SentenceTransformer",),
    "prompts": _ANY,
    "default_prompt_name": _ANY,
    "similarity_fn_name": ("cosine", "dot", "dot_product", None),
}

# The names of each role's prompt; the first of them that has one counts.
_ROLES = {"query": ("query", "web_search_query"), "document": ("document", "passage", "corpus")}


class DescriptionError(UserError):
    """A source's description of its encoder that can't be read, or asks for something that is not reproduced."""


@dataclass(frozen=True)
class Description:
    """Fields of a manifest by name, and the linear layers behind pooling, folded into one.

    `known_to_transformers` says that its stock classes attend as the encoder does.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    head: Head | None = None
    known_to_transformers: bool = False


def description_of(sources: Sequence[Source], attention: Attention | None = None) -> Description:
    """What the files of the first source that has any say of the encoder; nothing if none of them has.

    An adapter that was trained here adds to what the later sources say: it was trained for an encoder of their form.

    Raises:
        DescriptionError: for whatever they ask for that is not reproduced; and if no `attention` is asked for and only
            code of the model's own, which never runs, says which it is.
        CheckpointError: for a file that can't be read.
    """
    for place, source in enumerate(sources):
        modules, official = _modules(source.folder), _official(source)
        if modules and official:
            raise DescriptionError(
                f"{source.folder} has {MODULES_FILE} and llm2vec_config.json, and it can't be told which of them "
                "holds: remove one"
            )
        if modules:
            return _of_modules(source.folder, modules, attention)
        if trained := _trained(source.folder):
            base = description_of(sources[place + 1 :], trained["attention"])
            return replace(base, fields={**base.fields, **official, **trained})
        if official:
            return Description(official)
    return Description()


def _trained(folder: Path) -> dict[str, Any]:
    """The fields that training wrote; {} if the folder is no adapter that was trained here."""
    path = folder / TRAINED_FILE
    if not path.is_file():
        return {}
    raw = read_json_object(path)
    attention = raw.get("attention")
    if attention not in get_args(Attention):
        raise DescriptionError(f"{path} has the attention {attention!r}: it is one of {', '.join(get_args(Attention))}")
    widths = {"widths": _widths(path, raw["widths"])} if raw.get("widths") else {}
    return {"attention": attention, **widths}


def _official(source: Source) -> dict[str, Any]:
    """The settings in the official library's own file beside the weights; {} if there is no such file."""
    path = source.folder / "llm2vec_config.json"
    if not path.is_file():
        return {}
    raw = read_json_object(path)
    found = {
        "pooling": raw.get("pooling_mode"),
        **{key: raw.get(key) for key in ("skip_instruction", "max_length", "doc_max_length")},
    }
    asked = {key: value for key, value in found.items() if value is not None}
    try:
        recipe_from("llm2vec_config", base=source.reference, **asked)
    except RecipeError as error:
        raise DescriptionError(f"{path}: {error}") from error
    return asked


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """The modules that modules.json names, as their kind and folder; [] if there is no such file, or it is our own."""
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    with reading(path, "is no list of modules", (ValueError, KeyError, TypeError)):
        entries = parse_json(path.read_text(encoding="utf-8"))
        named = [(str(entry["type"]), str(entry["path"])) for entry in sorted(entries, key=lambda entry: entry["idx"])]
    if [kind for kind, _ in named] == [OWN_MODULE]:
        return []
    modules = []
    for kind, place in named:
        name = kind.rpartition(".")[2]
        if not kind.startswith("sentence_transformers.") or name not in _MODULES:
            raise DescriptionError(
                f"{path} has the module {kind}, which is not reproduced: an encoder can have {', '.join(_MODULES)}"
            )
        modules.append((name, folder / place))
    kinds = [name for name, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or sorted(kinds[2:]) != kinds[2:] or kinds.count("Normalize") > 1:
        raise DescriptionError(
            f"{path} has the modules {', '.join(kinds)}: an encoder has Transformer and Pooling, then Dense layers, "
            "then Normalize"
        )
    return modules


def _of_modules(folder: Path, modules: list[tuple[str, Path]], asked: Attention | None) -> Description:
    (_, transformer), (_, pooling), *others = modules
    if transformer.resolve() != folder.resolve():
        raise DescriptionError(f"{folder / MODULES_FILE} has its Transformer in {transformer.name}: give that folder")
    config = read_raw_config(folder)
    decoder = {**config, **(config.get("text_config") or {})}
    own_name = decoder.get("model_type") in BIDIRECTIONAL_NAMES
    bidirectional = own_name or decoder.get("is_causal") is False or decoder.get("use_bidirectional_attention")
    own_code = "AutoModel" in (config.get("auto_map") or {}) and config.get("is_causal") is None
    if asked is None and own_code and not bidirectional:
        raise DescriptionError(
            f"{folder / 'config.json'} names code of the model's own, which never runs, and does not say is_causal: "
            "name the attention in a recipe, causal or bidirectional, or as bidirectional in a training configuration"
        )
    settings = _settings(transformer / "sentence_bert_config.json", _TRANSFORMER)
    longest = settings.get("max_seq_length")
    fields = {
        "attention": "bidirectional" if bidirectional else "causal",
        "template": Template(lead=VERBATIM),
        **_pooling(pooling / "config.json"),
        **({"max_length": longest, "doc_max_length": longest} if isinstance(longest, int) else {}),
        **_prompts(folder / "config_sentence_transformers.json"),
    }
    if widths := config.get("matryoshka_dimensions"):
        fields["widths"] = _widths(folder / "config.json", widths, "matryoshka_dimensions")
    own_flag = config.get("use_bidirectional_attention") and config.get("model_type") != "gemma3_text"
    head = folded([_dense(place) for kind, place in others if kind == "Dense"])
    return Description(fields, head, not (own_name or own_flag or any(folder.glob("*.gguf"))))


def _widths(path: Path, given: Any, key: str = "widths") -> tuple[int, ...]:
    """The widths that vectors may be cut to."""
    with reading(path, f"has {key} {given!r}, which are no widths"):
        return TypeAdapter(Widths).validate_python(given)


def _settings(path: Path, reproduced: Mapping[str, tuple[Any, ...] | None]) -> dict[str, Any]:
    """The settings in a file, {} if it is not there, after a check that all of them are reproduced."""
    raw = read_json_object(path) if path.is_file() else {}
    for key, value in raw.items():
        if key not in reproduced:
            raise DescriptionError(f"{path} has the setting {key} ({value!r}), which is not reproduced")
        values = reproduced[key]
        if values is not None and value not in values:
            raise DescriptionError(f"{path} asks for {key} {value!r}, which is not reproduced")
    return raw


def _pooling(path: Path) -> dict[str, Any]:
    """The manifest's pooling and span."""
    settings = _settings(path, _POOLING)
    asked = {mode for flag, mode in POOLING_FLAGS.items() if settings.get(flag) is True}
    if mode := settings.get("pooling_mode"):
        asked.add(_POOLINGS[mode])
    if len(asked) != 1:
        raise DescriptionError(f"{path} asks for {len(asked)} poolings ({', '.join(sorted(asked))}) instead of one")
    pooling = asked.pop()
    if settings.get("include_prompt") is not False:
        return {"pooling": pooling, "skip_instruction": False}
    if pooling not in _WITHOUT_PROMPT:
        raise DescriptionError(f"{path} asks for include_prompt False of {pooling} pooling, which is not reproduced")
    return {"pooling": pooling, "skip_instruction": True, "span_count": "prompt"}


def _prompts(path: Path) -> dict[str, Any]:
    """The manifest's prompts: each role's, all by name, and the role of a text whose request names none."""
    settings = _settings(path, _PROMPTS)
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise DescriptionError(f"{path} has prompts that are no texts by name")
    if default is not None and default not in prompts:
        raise DescriptionError(f"{path} has the default_prompt_name {default!r}, which is none of its prompts")
    found = {
        f"{role}_instruction": next((prompts[name] for name in names if prompts.get(name)), "")
        for role, names in _ROLES.items()
    }
    return {**found, "prompts": prompts, "default_prompt": default or ""}


def _dense(folder: Path) -> Head:
    """One linear layer, without an activation."""
    settings = _settings(folder / "config.json", _DENSE)
    if "activation_function" not in settings:
        raise DescriptionError(f"{folder / 'config.json'} names no activation_function, which is then tanh")
    tensors = load_tensors(folder / "model.safetensors", folder / "pytorch_model.bin")
    weight, bias = tensors.pop("linear.weight", None), tensors.pop("linear.bias", None)
    if weight is None or tensors:
        raise DescriptionError(
            f"{folder} holds {', '.join(sorted(tensors)) or 'no linear.weight'}: not one linear layer"
        )
    return Head(weight, torch.zeros(len(weight)) if bias is None else bias)


def folded(layers: list[Head]) -> Head | None:
    """Linear layers one behind the other as a single one, multiplied in float64; None if there are none."""
    if not layers:
        return None
    weight, bias = layers[0].weight.double(), layers[0].bias.double()
    for layer in layers[1:]:
        weight, bias = layer.weight.double() @ weight, layer.weight.double() @ bias + layer.bias.double()
    return Head(weight.float(), bias.float())
