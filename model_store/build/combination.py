"""Several LoRA adapters as one, whose update of each weight is the weighted sum of theirs, in peft's own format.

The ways are those of peft's `add_weighted_adapter`, under its names, without a base: only A and B are needed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_store.build.adapters import Adapter, AdapterError, LowRankUpdate, load_adapter
from model_store.build.build import TRAINING_CONFIG_FILE
from model_store.build.description import TRAINED_FILE
from model_store.build.sources import Source, resolve
from model_store.json_text import read_json_object
from model_store.recipe import packaged_recipes

CombinationType = Literal["cat", "svd", "linear"]

# Files beside an adapter that say for what encoder it was trained.
_DESCRIPTIONS = ("llm2vec_config.json", TRAINED_FILE)

# Keys of adapter_config.json that the combined adapter has from the first one.
_KEPT = ("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "lora_dropout", "revision", "task_type")

# (A, B), float64: A is (r, in) and B (out, r), and the update is B·A.
_Factors = tuple[Tensor, Tensor]
_Weighted = Sequence[tuple[LowRankUpdate, float]]


@dataclass(frozen=True)
class Combined:
    """The `rank` of the combined adapter, and how far it is from the weighted sum, as a share of the sum's norm."""

    rank: int
    error: float


def combine_adapters(
    references: Sequence[str],
    weights: Sequence[float],
    folder: Path,
    combination_type: CombinationType = "cat",
    svd_rank: int | None = None,
) -> Combined:
    """Write the adapter to `folder`, which must not exist or be empty. adapter_config.json comes last.

    Raises:
        AdapterError, CheckpointError, SourceError: if an adapter can't be read, or they don't belong together.
    """
    _check_asked(references, weights, folder, combination_type, svd_rank)
    with ExitStack() as stack:
        sources = [stack.enter_context(resolve(reference)) for reference in references]
        adapters = [load_adapter(source.folder, source.reference) for source in sources]
        _refuse_strangers(sources, adapters)
        weighted = list(zip(adapters, weights, strict=True))
        names = sorted({name for adapter in adapters for name in adapter.updates})
        found: dict[str, _Factors] = {}
        missed = whole = 0.0
        for name in names:
            some = [(each.updates[name], weight) for each, weight in weighted if name in each.updates]
            exact = _cat(some)
            found[name] = _combine(some, combination_type, svd_rank, name)
            missed += _squared_norm(*_difference(found[name], exact))
            whole += _squared_norm(*exact)
        about = {"adapters": list(zip(references, weights, strict=True)), "combination_type": combination_type}
        _write(found, sources, about, folder)
    rank = max(len(a) for a, _ in found.values())
    return Combined(rank, math.sqrt(missed / whole) if whole else 0.0)


def _check_asked(
    references: Sequence[str], weights: Sequence[float], folder: Path, way: CombinationType, svd_rank: int | None
) -> None:
    if len(weights) != len(references):
        raise AdapterError(f"{len(references)} adapters and {len(weights)} weights: give one weight for each adapter")
    if not all(map(math.isfinite, weights)):
        raise AdapterError(f"the weights are {', '.join(map(str, weights))}: they must be finite")
    if svd_rank is not None and (way != "svd" or svd_rank < 1):
        raise AdapterError(f"svd_rank is {svd_rank}: give it with combination_type svd, and at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"{folder} is there already and not empty: choose another place or remove it")


def _refuse_strangers(sources: Sequence[Source], adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that change different weights. What an adapter's files don't say can't be compared."""
    configs = [read_json_object(source.folder / "adapter_config.json") for source in sources]
    first = sources[0].reference
    for source, adapter, config in zip(sources[1:], adapters[1:], configs[1:], strict=True):
        for key in ("base_model_name_or_path", "revision"):
            one, other = configs[0].get(key), config.get(key)
            if one and other and one != other:
                raise AdapterError(
                    f"{first} has the {key} {one}, and {source.reference} has {other}: only adapters of one base can "
                    "be combined. If these are names of the same base, write one of them in both adapter_config.json"
                )
        before, others = _stages_before(sources[0]), _stages_before(source)
        if before is not None and others is not None and before != others:
            raise AdapterError(
                f"{first} was trained on top of {', '.join(before) or 'the base alone'}, and {source.reference} on top "
                f"of {', '.join(others) or 'the base alone'}: combine adapters of the same stage; those of different "
                "stages are merged one after the other, with build --adapter"
            )
        _refuse_other_encoder(sources[0], source)
        for name in adapter.updates.keys() & adapters[0].updates.keys():
            if (shape := adapter.updates[name].shape()) != (wanted := adapters[0].updates[name].shape()):
                raise AdapterError(
                    f"the update of {name} has shape {wanted} in {first} and {shape} in {source.reference}: they were "
                    "trained for different bases"
                )


def _stages_before(source: Source) -> tuple[str, ...] | None:
    """The adapters on top of which this one was trained, as far as its files or a packaged recipe say it."""
    config = source.folder / TRAINING_CONFIG_FILE
    if config.is_file():
        before = read_json_object(config).get("peft_model_name_or_path") or []
        return (before,) if isinstance(before, str) else tuple(before)
    for recipe in packaged_recipes().values():
        for place, reference in enumerate(recipe.adapters):
            if Path(source.reference.partition("@")[0]).name == Path(reference).name:
                return recipe.adapters[:place]
    # Of a chain of adapters the first one alone comes with the base's config.json.
    return () if (source.folder / "config.json").is_file() else None


def _refuse_other_encoder(one: Source, other: Source) -> None:
    for file in _DESCRIPTIONS:
        paths = [source.folder / file for source in (one, other)]
        if all(path.is_file() for path in paths):
            said, also = map(read_json_object, paths)
            if differing := [key for key in sorted(said.keys() | also.keys()) if said.get(key) != also.get(key)]:
                key = differing[0]
                raise AdapterError(
                    f"{paths[0]} has the {key} {said.get(key)!r}, and {paths[1]} {also.get(key)!r}: the adapters were "
                    "trained for different encoders. If they may be combined all the same, make the files alike"
                )


def _combine(some: _Weighted, way: CombinationType, svd_rank: int | None, name: str) -> _Factors:
    if way == "linear":
        return _linear(some, name)
    if way == "svd":
        return _svd(some, svd_rank or max(len(update.a) for update, _ in some))
    return _cat(some)


def _cat(some: _Weighted) -> _Factors:
    """The sum itself: ranks add up."""
    a = torch.cat([update.a.double() * (weight * update.scale) for update, weight in some])
    return a, torch.cat([update.b.double() for update, _ in some], dim=1)


def _svd(some: _Weighted, rank: int) -> _Factors:
    """The nearest update of that rank (Eckart and Young 1936), by the small matrices of two QR decompositions."""
    a, b = _cat(some)
    left, b_triangle = torch.linalg.qr(b)
    right, a_triangle = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(b_triangle @ a_triangle.T)
    rank = min(rank, len(values))
    return v[:rank] @ right.T, left @ (u[:, :rank] * values[:rank])


def _linear(some: _Weighted, name: str) -> _Factors:
    """Sums of A and of B, as peft makes them: their product also has terms of one adapter's B and another's A."""
    ranks = sorted({len(update.a) for update, _ in some})
    if len(ranks) > 1:
        raise AdapterError(
            f"combination_type linear needs equal ranks, and those of {name} are {', '.join(map(str, ranks))}: use cat "
            "or svd"
        )
    factors = [math.sqrt(abs(weight * update.scale)) for update, weight in some]
    a = [update.a.double() * math.copysign(by, weight) for (update, weight), by in zip(some, factors, strict=True)]
    b = [update.b.double() * by for (update, _), by in zip(some, factors, strict=True)]
    return torch.stack(a).sum(0), torch.stack(b).sum(0)


def _difference(one: _Factors, other: _Factors) -> _Factors:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], -other[1]], dim=1)


def _squared_norm(a: Tensor, b: Tensor) -> float:
    """The squared Frobenius norm of B·A, without the product; rounding may make nothing a little less than nothing."""
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)


def _write(found: dict[str, _Factors], sources: Sequence[Source], about: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = sources[0].folder
    for path in sorted(first.iterdir()):
        if path.suffix in (".json", ".model") and path.name not in ("adapter_config.json", TRAINING_CONFIG_FILE):
            shutil.copyfile(path, folder / path.name)
    if before := _stages_before(sources[0]):
        _write_json(folder / TRAINING_CONFIG_FILE, {"peft_model_name_or_path": list(before)})
    tensors = {}
    for name, (a, b) in found.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{place}.lora_B.weight"] = b.float().contiguous()
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt", "combined": json.dumps(about)})
    weights.chmod(0o644)
    _write_json(folder / "adapter_config.json", _config(found, read_json_object(first / "adapter_config.json")))


def _config(found: dict[str, _Factors], first: dict[str, Any]) -> dict[str, Any]:
    """A configuration under which peft scales no update. Whole names of modules are exact wherever these stand."""
    ranks = {name.removesuffix(".weight"): len(a) for name, (a, _) in found.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        **{key: first[key] for key in _KEPT if key in first},
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "use_rslora": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
