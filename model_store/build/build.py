"""From a recipe to a stored encoder: base and adapters merged tensor by tensor into a folder of their own.

The folder appears whole or not at all: it is written beside its place and renamed. Memory peaks at one shard
of weights while merging, and at one copy of the model for the self-test.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model_store.architectures import Attention, architecture_of, direct
from model_store.build.adapters import Adapter, check_fit, load_adapter
from model_store.build.checkpoints import Checkpoint, decoder_on_meta, open_checkpoint, read_raw_config
from model_store.build.description import MODULES_FILE, OWN_MODULE, Description, description_of, folded
from model_store.build.self_test import write_self_test
from model_store.build.sources import Source, resolve
from model_store.build.tokenizer_files import write_tokenizer
from model_store.encoder.head import Head
from model_store.errors import UserError
from model_store.json_text import read_json_object
from model_store.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    SourceRecord,
    describe_files,
    find_built,
)
from model_store.pooling_modes import PoolingMode
from model_store.recipe import ENCODER_DEFAULTS, Recipe, packaged_recipes
from model_store.rope import readable_positions
from model_store.templates import template_for
from model_store.text.tokenizer import special_tokens_around

SHARD_BYTES = 2 << 30

# What training writes beside an adapter.
TRAINING_CONFIG_FILE = "training_config.json"

# What a recipe may say of an encoder beside its weights; else the files that come with them say it.
_DESCRIBED = (*ENCODER_DEFAULTS, "template", "query_instruction", "document_instruction", "widths")

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]


class BuildError(UserError):
    """The parts of a recipe don't make an encoder; the message names the part and the way out."""


def build_encoder(
    recipe: Recipe,
    folder: Path,
    progress: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
    replaces: bool = False,
) -> Manifest:
    """Build the encoder of a recipe in `folder`, which must not exist, be empty, or hold this very encoder, whole.

    With `replaces`, the folder may also hold a damaged encoder, or that of another recipe. Weights are written in
    shards of at most `shard_bytes`, each held in memory while it is filled.

    Raises:
        BuildError, SourceError, CheckpointError, AdapterError, UnsupportedArchitectureError: nothing is left
            behind, and the message says what to change.
    """
    with _alone_with(folder):  # the process that had the folder before may have built it
        if built := find_built(folder, recipe):
            return built
        free = replaces and (folder / MANIFEST_FILE).is_file()
        if not free and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BuildError(f"{folder} is there already and not empty: choose another place or remove it")
        return _build(recipe, folder, progress, shard_bytes)


def ensure_built(recipe: Recipe, folder: Path, progress: Progress = lambda done, total: None) -> Manifest:
    """The manifest of the recipe's encoder in `folder`, built now if it is not there whole and unchanged.

    A folder with another encoder is replaced once the new encoder is whole. If several processes ask at once, one
    builds, and the others wait and find the encoder built.
    """
    return find_built(folder, recipe) or build_encoder(recipe, folder, progress, replaces=True)


def attention_of(recipe: Recipe) -> Attention:
    """The attention of the recipe's encoder. Sources are fetched if only their files say it.

    Raises:
        SourceError, CheckpointError, DescriptionError: as `build_encoder`.
    """
    if recipe.attention:
        return recipe.attention
    with ExitStack() as sources:
        described = [sources.enter_context(resolve(each)) for each in (*recipe.adapters[-1:], recipe.base)]
        attention: Attention = _fields(recipe, description_of(described))["attention"]
        return attention


def _build(recipe: Recipe, folder: Path, progress: Progress, shard_bytes: int) -> Manifest:
    _refuse_missing_stage(recipe)
    with ExitStack() as sources:
        base = sources.enter_context(resolve(recipe.base))
        stages = [sources.enter_context(resolve(reference)) for reference in recipe.adapters]
        _refuse_lone_second_stage(stages)
        checkpoint = open_checkpoint(base.folder, recipe.ignored_config_keys)
        adapters = [load_adapter(stage.folder, stage.reference) for stage in stages]
        shapes = check_names(recipe.base, checkpoint, adapters, recipe.head_tensor)
        described = description_of([*stages[-1:], base], recipe.attention)
        if recipe.described_by_files and not described.fields:
            raise BuildError(
                f"the recipe {recipe.name} leaves it to files such as {MODULES_FILE} to describe the encoder, and "
                f"{recipe.base} has none: give the repository as it is published"
            )
        head = _head(recipe, checkpoint, described.head)
        fields = _fields(recipe, described)
        width, widths = len(head.bias) if head else checkpoint.config.hidden_size, fields.get("widths", ())
        if widths and max(widths) > width:
            raise BuildError(
                f"vectors of {width} dimensions can't be cut to {max(widths)}: leave that out of the recipe's widths"
            )
        fields |= {"width": width, "widths": (*widths, width) if widths else ()}
        with _appearing_whole(folder) as staging:
            _write_config(checkpoint.config, recipe.dtype, fields["attention"], staging)
            tokenizer_source = write_tokenizer(base, stages, staging)
            _write_weights(checkpoint, adapters, shapes, recipe.dtype, staging, progress, shard_bytes)
            if head:
                head.write(staging)
            _write_sentence_transformers_files(fields, staging)
            manifest = _describe(recipe, base, stages, checkpoint, shapes, tokenizer_source, fields, staging)
            manifest.write(staging)
            alike = not adapters and fields["attention"] == described.fields.get("attention")
            write_self_test(staging, base.folder if alike and described.known_to_transformers else None)
            manifest = manifest.model_copy(update={"files": describe_files(staging)})
            manifest.write(staging)
    return manifest


def _fields(recipe: Recipe, described: Description) -> dict[str, Any]:
    """The manifest's fields that describe the encoder: the recipe's win over those of the files."""
    asked = {key: value for key in _DESCRIBED if (value := getattr(recipe, key)) not in (None, "", ())}
    return {**ENCODER_DEFAULTS, **described.fields, **asked}


def _refuse_missing_stage(recipe: Recipe) -> None:
    """Refuse a published second-stage adapter without its first stage: its own files don't say that it needs one."""
    first = _repository_name(recipe.adapters[0]) if recipe.adapters else ""
    for published in packaged_recipes().values():
        *before, last = [_repository_name(reference) for reference in published.adapters] or [""]
        if before and first == last:
            raise BuildError(
                f"the adapter {last} was trained on top of {', '.join(before)}, which must be merged before it: "
                f"use --recipe {published.name}, or give the adapters in this order: {', '.join(published.adapters)}"
            )


def _refuse_lone_second_stage(stages: Sequence[Source]) -> None:
    """Refuse an adapter that was trained here on top of others which are not merged before it."""
    config = stages[0].folder / TRAINING_CONFIG_FILE if stages else None
    if config and config.is_file() and (before := read_json_object(config).get("peft_model_name_or_path")):
        names = before if isinstance(before, str) else ", ".join(map(str, before))
        raise BuildError(
            f"the adapter {stages[0].reference} was trained on top of {names} ({config.name} says so), which must be "
            "merged before it: give that adapter first"
        )


def _repository_name(reference: str) -> str:
    """The last part of a hub id or path: a local copy has the same."""
    return reference.partition("@")[0].rstrip("/").rpartition("/")[2]


def _head(recipe: Recipe, checkpoint: Checkpoint, behind_pooling: Head | None) -> Head | None:
    """The layer behind the decoder and those behind pooling, in one: pooling a linear layer's outputs is the same."""
    if not recipe.head_tensor:
        return behind_pooling
    weight = checkpoint.tensor(recipe.head_tensor).float()
    if weight.dim() != 2 or weight.shape[1] != checkpoint.config.hidden_size:
        raise BuildError(f"head_tensor {recipe.head_tensor} has shape {tuple(weight.shape)}: it is no linear layer")
    return folded([Head(weight, torch.zeros(len(weight))), *([behind_pooling] if behind_pooling else [])])


def check_names(
    reference: str, checkpoint: Checkpoint, adapters: list[Adapter], head_tensor: str = ""
) -> dict[str, tuple[int, ...]]:
    """The encoder's tensor names and shapes, after a check that the base (called `reference`) and adapters fit them.

    `head_tensor` is one more that the base has to hold.

    Raises:
        BuildError, AdapterError, UnsupportedArchitectureError: if they don't.
    """
    architecture_of(checkpoint.config.model_type)
    decoder = decoder_on_meta(checkpoint.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    wanted = shapes.keys() | ({head_tensor} if head_tensor else set())
    missing, extra = wanted - checkpoint.names, checkpoint.names - wanted
    if missing:
        raise BuildError(f"the base {reference} lacks {_some(missing)}: its files are incomplete")
    if extra:
        raise BuildError(
            f"the base {reference} holds {_some(extra)}, for which a {checkpoint.config.model_type} encoder "
            "has no place" + ("" if head_tensor else ": a recipe's head_tensor may name a linear layer among them")
        )
    for adapter in adapters:
        check_fit(adapter, shapes)
    return shapes


def _write_config(config: Any, dtype: str, attention: Attention, folder: Path) -> None:
    """Write the bare decoder's config.json, which tells transformers whether its attention is bidirectional."""
    config = copy.deepcopy(config)
    for stale in ("auto_map", "_name_or_path", "quantization_config"):
        config.__dict__.pop(stale, None)
    direct(config, attention)
    config.use_cache = False
    config.dtype = getattr(torch, dtype)
    config.architectures = [type(decoder_on_meta(config)).__name__]
    config.save_pretrained(folder)
    path = folder / CONFIG_FILE
    written = json.loads(path.read_text())
    written.pop("transformers_version", None)  # the manifest has it, among the tools
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _write_sentence_transformers_files(fields: Mapping[str, Any], folder: Path) -> None:
    """Write the files that sentence-transformers reads: the module for this folder, and the instructions by name."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": OWN_MODULE}]
    roles = {role: fields.get(f"{role}_instruction", "") for role in ("query", "document")}
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {**fields.get("prompts", {}), **roles},
        "default_prompt_name": fields.get("default_prompt") or None,
        "similarity_fn_name": "cosine",
    }
    for name, content in ((MODULES_FILE, modules), ("config_sentence_transformers.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(
    checkpoint: Checkpoint,
    adapters: list[Adapter],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    folder: Path,
    progress: Progress,
    shard_bytes: int,
) -> None:
    """Write the merged tensors as safetensors shards, with an index if there are several."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    planned = {name: torch.empty(shape, dtype=torch_dtype, device="meta") for name, shape in shapes.items()}
    shards = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    total, done = shards.metadata["total_size"], 0
    free = shutil.disk_usage(folder).free
    if free < total:
        raise BuildError(f"{folder.parent} has {free / 1e9:.1f} GB free, the encoder needs {total / 1e9:.1f} GB")
    for file, names in shards.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[name] = merged_tensor(checkpoint, adapters, name, shapes[name], torch_dtype)
            done += tensors[name].nbytes
            progress(done, total)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file makes it private, and a server may run as another user
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def merged_tensor(
    checkpoint: Checkpoint, adapters: list[Adapter], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The base's tensor of that name with every adapter's update, rounded to `dtype` once.

    Raises:
        BuildError: if the base's tensor has another shape, or the merged one is not finite.
    """
    weight = checkpoint.tensor(name)
    if tuple(weight.shape) != shape:
        raise BuildError(f"the base's {name} has shape {tuple(weight.shape)}, its config.json asks for {shape}")
    updates = [adapter.updates[name] for adapter in adapters if name in adapter.updates]
    if updates:
        weight = weight.to(torch.float32, copy=True)
        for update in updates:
            update.add_to(weight)
    weight = weight.to(dtype).contiguous()
    if not weight.isfinite().all():
        raise BuildError(f"{name} holds NaN or infinite values after merging")
    return weight


def _describe(
    recipe: Recipe,
    base: Source,
    stages: list[Source],
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    tokenizer_source: str,
    fields: Mapping[str, Any],
    folder: Path,
) -> Manifest:
    config = checkpoint.config
    pooling: PoolingMode = fields["pooling"]
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    before, after = special_tokens_around(tokenizer)
    if pooling == "bos_token" and not before:
        raise BuildError("bos_token pooling needs a tokenizer that puts BOS before a text, and this one does not")
    template = fields.get("template")
    if template is None:
        template = template_for(base_name(base, stages), pooling, architecture_of(config.model_type))
    elif after and template.suffix and tokenizer.encode(template.suffix, add_special_tokens=False).ids == after:
        template = replace(template, suffix="")  # the tokenizer puts the same there by itself
    return Manifest.model_validate(
        {
            "name": recipe.name,
            "model_type": config.model_type,
            "max_positions": readable_positions(config.to_dict()),
            "vocabulary": shapes["embed_tokens.weight"][0],
            "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
            "dtype": recipe.dtype,
            "base": SourceRecord.of(base.reference, base.commit),
            "adapters": [SourceRecord.of(stage.reference, stage.commit) for stage in stages],
            "tokenizer": tokenizer_source,
            "query_instruction": "",
            **fields,
            "template": template,
            "recipe": recipe,
            "recipe_fingerprint": recipe.fingerprint,
            "tools": _tool_versions(),
            "files": describe_files(folder),
        }
    ).sealed(folder)


def base_name(base: Source, stages: Sequence[Source]) -> str:
    """The name that chooses the template: the MNTP repository's raw `_name_or_path`, else the base's.

    As in the official library, a base on the hub is called by its id, and a base in a folder by its raw config.json.
    """
    for source in (*stages, *([base] if base.commit is None else [])):
        name = read_raw_config(source.folder).get("_name_or_path")
        if name:
            return str(name)
    return base.reference.partition("@")[0]


def _tool_versions() -> dict[str, str]:
    versions = {}
    for package in ("llm2vec-service", "torch", "transformers", "peft", "safetensors", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which takes the place of `folder` if the block succeeds, and is removed if it fails.

    The remains of builds that were killed are removed first: the caller is alone with the folder.
    """
    prefix = f".{folder.name}-building-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        staging = Path(scratch) / folder.name
        staging.mkdir()
        yield staging
        if folder.is_dir():
            folder.replace(Path(scratch) / "replaced")
        staging.replace(folder)


@contextmanager
def _alone_with(folder: Path) -> Iterator[None]:
    """Wait until no other process builds this folder, and keep others from it within the block.

    A process that is killed frees the lock. The lock's file is removed at the end, so a process that waited may lock a
    file that is gone; it then tries again with the newer file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
