"""The examples of a configuration: the training examples and the held-out ones, from files or the hub.

Files are plain lines, JSON or JSON lines. Errors name the file and the line.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from model_store.errors import UserError
from model_store.evaluation.sts import ScoredPair, read_pairs
from model_store.json_text import parse_json
from model_store.text.files import checked, json_values, numbered_lines, open_text, readable
from model_store.training.config import MntpConfig, TrainingConfig, TrainingConfigError

# The default percentage of texts held out, as in the official scripts.
_DEFAULT_HELD_OUT = {"mntp": 5, "simcse": 0, "supervised": 0}

# The keys that may hold each field of a triplet.
_FIELDS = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "pos", "document", "answer"),
    "negative": ("negative", "neg"),
    "instruction": ("instruction", "user_prompt", "prompt"),
    "passage_instruction": ("passage_instruction",),
}


class TrainingDataError(UserError):
    """Texts that can't be read, or too few texts; the message names the file and, if there is one, the line."""


@dataclass(frozen=True)
class Triplet:
    """A query, the text it must find, and a text it must not find. Negatives are drawn within a `group`.

    `negative` is None in data of pairs. An instruction "" is none; the negative has the positive's instruction.
    """

    query: str
    positive: str
    negative: str | None = None
    instruction: str = ""
    passage_instruction: str = ""
    group: str = ""


@dataclass(frozen=True)
class Examples:
    """The training examples and the held-out examples: texts or triplets. `pairs` are the pairs of eval_sts_file."""

    train: list[Any]
    held_out: list[Any]
    pairs: list[ScoredPair]


def read_examples(config: TrainingConfig, arguments: TrainingArguments) -> Examples:
    evaluated = arguments.do_eval or arguments.eval_strategy != "no"
    supervised = config.stage == "supervised"
    read = partial(read_triplets, e5=config.dataset_name == "E5") if supervised else read_texts
    pairs_file = None if isinstance(config, MntpConfig) else config.eval_sts_file
    pairs = read_pairs(pairs_file) if pairs_file else []
    held_out: list[Any] = []
    if config.train_file is not None:
        examples: list[Any] = list(read(config.train_file))
    else:
        with arguments.main_process_first(desc="fetching the dataset"):
            examples, held_out = _fetch_dataset(config, evaluated)
    if evaluated and config.validation_file is not None:
        held_out = list(read(config.validation_file))
    elif evaluated and not held_out:
        percentage = config.validation_split_percentage
        percentage = _DEFAULT_HELD_OUT[config.stage] if percentage is None else percentage
        first = len(examples) * percentage // 100
        held_out, examples = examples[:first], examples[first:]
        if not held_out and not pairs:
            raise TrainingConfigError(
                "evaluation is asked for, but nothing is held out: give validation_file, validation_split_percentage "
                'or eval_sts_file, or set eval_strategy to "no" and do_eval false'
            )
        if not held_out and arguments.metric_for_best_model in ("loss", "eval_loss"):
            raise TrainingConfigError(
                "metric_for_best_model is loss, but nothing is held out to measure it on: set it to spearman, or give "
                "validation_file or validation_split_percentage"
            )
    return Examples(examples[: config.max_train_samples], held_out[: config.max_eval_samples], pairs)


def read_texts(path: Path) -> list[str]:
    """Texts of a .txt file (one a line), or a .json or .jsonl file (strings, or objects with "text"). All may be .gz.

    Lines with only white space are left out.

    Raises:
        TrainingDataError: for a file that can't be read, or a line that is no text.
    """
    texts = []
    for line, value in _values(path, plain=True):
        if isinstance(value, dict):
            if "text" not in value:
                raise TrainingDataError(f'{path}, {line}: there is no "text" among {", ".join(map(repr, value))}')
            value = value["text"]
        if not isinstance(value, str):
            raise TrainingDataError(f"{path}, {line}: a text must be a string, not {_kind(value)}")
        if text := value.strip():
            texts.append(text)
    return texts


def read_triplets(path: Path, e5: bool = False) -> list[Triplet]:
    """Triplets or pairs of a .jsonl or .json file (may be .gz), or of all such files in a folder. Each file is a group.

    With `e5` a query without an instruction gets the instruction that LLM2Vec used for a file of that name.

    Raises:
        TrainingDataError: for a file that can't be read, or a line that is no triplet.
    """
    if path.is_dir():
        paths = sorted(child for child in path.iterdir() if re.search(r"\.jsonl?(\.gz)?$", child.name))
        if not paths:
            raise TrainingDataError(f"{path} holds no .jsonl file")
    else:
        paths = [path]
    triplets = []
    for file in paths:
        group = file.name.partition(".")[0]
        instructions = _e5_instructions(group) if e5 else [""]
        for number, (line, value) in enumerate(_values(file, plain=False)):
            triplets.append(_triplet_of(value, f"{file}, {line}", group, instructions[number % len(instructions)]))
    return triplets


def _fetch_dataset(config: TrainingConfig, evaluated: bool) -> tuple[list[Any], list[Any]]:
    """(train, validation) of a dataset on the hub."""
    from datasets import load_dataset

    try:
        splits = load_dataset(config.dataset_name, config.dataset_config_name, cache_dir=config.cache_dir)
    except Exception as error:  # the hub's client and the dataset's reader may raise anything
        raise TrainingDataError(
            f"the dataset {config.dataset_name} could not be fetched ({error}): check its name and the network, or "
            "give its texts as train_file"
        ) from error

    def examples(split: str) -> list[Any]:
        if split not in splits:
            return []
        rows, where = splits[split], f"{config.dataset_name}, {split}"
        if config.stage == "supervised":
            return [_triplet_of(row, f"{where}, row {number}") for number, row in enumerate(rows, 1)]
        column = "text" if "text" in rows.column_names else rows.column_names[0]
        return [text.strip() for text in rows[column] if text and text.strip()]

    return examples("train"), examples("validation") if evaluated else []


def _triplet_of(value: Any, where: str, group: str = "", instruction: str = "") -> Triplet:
    """The triplet that a JSON object holds; the `instruction` is for an object without its own.

    Raises:
        TrainingDataError: if the object holds no triplet.
    """
    if not isinstance(value, dict):
        raise TrainingDataError(f"{where}: an example must be an object with query and positive, not {_kind(value)}")
    found: dict[str, str] = {}
    for field, names in _FIELDS.items():
        name = next((name for name in names if value.get(name) is not None), None)
        if name is None:
            continue
        text = value[name]
        if isinstance(text, list) and field in ("positive", "negative"):  # a list of several: the first is taken
            text = text[0] if text else None
        if not isinstance(text, str):
            raise TrainingDataError(f"{where}: {name} must be a string, not {_kind(text)}")
        if field in ("query", "positive", "negative") and not text.strip():
            raise TrainingDataError(f"{where}: {name} is empty")
        found[field] = text
    for field in ("query", "positive"):
        if field not in found:
            raise TrainingDataError(f"{where}: there is no {field!r} among {', '.join(map(repr, value))}")
    found["instruction"] = found.get("instruction") or instruction
    return Triplet(**found, group=group)


def _e5_instructions(name: str) -> list[str]:
    """The instructions for a file of the public E5 data, used by its lines in turn; [""] for any other name."""
    table = tomllib.loads((files("model_store.training") / "e5_instructions.toml").read_text())
    found = table.get(name, "")
    return found if isinstance(found, list) else [found]


def _values(path: Path, plain: bool) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line of a file, or of each item of a JSON array; every string is Unicode."""
    name, unit = path.name.removesuffix(".gz"), "line"
    found: Iterable[tuple[int, Any]]
    if name.endswith(".jsonl"):
        found = json_values(numbered_lines(path))
    elif name.endswith(".json"):
        unit, found = _json(path)
    elif plain and name.endswith((".txt", ".text")):
        found = numbered_lines(path)
    else:
        kinds = ".txt, .json or .jsonl" if plain else ".json or .jsonl"
        raise TrainingDataError(f"{path} is of no known kind: name it {kinds} (or one of them with .gz)")
    for number, value in checked(path, found, TrainingDataError, unit):
        yield f"{unit} {number}", value


def _json(path: Path) -> tuple[str, Iterable[tuple[int, Any]]]:
    """("item", a JSON array's items), or ("line", values) of the JSON lines that many call .json."""
    with readable(path, TrainingDataError), open_text(path) as file:
        content = file.read()
    try:
        whole = parse_json(content)
    except ValueError as error:
        if not content.lstrip().startswith("{"):
            raise TrainingDataError(f"{path} {error}") from error
        return "line", json_values(enumerate(content.split("\n"), 1))  # splitlines() would also split at U+2028
    if not isinstance(whole, list):
        raise TrainingDataError(f"{path} holds {_kind(whole)}: an array is needed, or JSON lines")
    return "item", enumerate(whole, 1)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} ({json.dumps(value)[:40]})"
