"""The examples of a configuration: the training examples and the held-out ones, from files or the hub.

Files are plain lines, JSON or JSON lines. Errors name the file and the line.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
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
from model_store.training.config import MntpConfig, SimcseConfig, SupervisedConfig, TrainingConfig, TrainingConfigError

# The default percentage of texts held out, as in the official scripts.
_DEFAULT_HELD_OUT = {"mntp": 5, "simcse": 0, "supervised": 0}

# The keys that may hold each field of an example.
_FIELDS = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "pos", "document", "answer"),
    "negative": ("negative", "neg"),
    "instruction": ("instruction", "user_prompt", "prompt"),
    "passage_instruction": ("passage_instruction",),
    "scores": ("scores", "score", "labels", "label"),
}


# Scores beyond it would be infinite in float32.
_INFINITE = 1e38


class TrainingDataError(UserError):
    """Texts that can't be read, or too few texts; the message names the file and, if there is one, the line."""


@dataclass(frozen=True)
class Example:
    """A query, the texts that it must find, and texts that it must not find. Other negatives come from its `group`.

    An instruction "" is none. `scores` are a teacher's, of positives, then of negatives; () if none is needed.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    instruction: str = ""
    passage_instruction: str = ""
    group: str = ""
    scores: tuple[float, ...] = ()

    @property
    def passages(self) -> tuple[str, ...]:
        """The positives, then the negatives."""
        return self.positives + self.negatives


@dataclass(frozen=True)
class Examples:
    """The training examples and the held-out examples: of MNTP texts, else `Example`s. `pairs` is for eval_sts_file."""

    train: list[Any]
    held_out: list[Any]
    pairs: list[ScoredPair]


def read_examples(config: TrainingConfig, arguments: TrainingArguments) -> Examples:
    evaluated = arguments.do_eval or arguments.eval_strategy != "no"
    read = _reader(config)
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


def _reader(config: TrainingConfig) -> Callable[[Path], list[Any]]:
    if isinstance(config, SupervisedConfig):
        return partial(read_contrastive, e5=config.dataset_name == "E5", needs=Needs.of(config))
    if isinstance(config, SimcseConfig):
        return lambda path: [Example(text, (text,)) for text in read_texts(path)]
    return read_texts


@dataclass(frozen=True)
class Needs:
    """What a distillation loss needs of each example."""

    scores: bool = False
    negatives: bool = False

    @classmethod
    def of(cls, config: SupervisedConfig) -> Needs:
        of_scores = config.distillation_loss in ("DistillKLDivLoss", "MarginMSELoss")
        return cls(scores=of_scores and not config.has_teacher, negatives=of_scores)


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


def read_contrastive(path: Path, e5: bool = False, needs: Needs = Needs()) -> list[Example]:
    """Examples of a .jsonl or .json file (may be .gz), or of all such files in a folder. Each file is a group.

    With `e5` a query without an instruction gets the instruction that LLM2Vec used for a file of that name.

    Raises:
        TrainingDataError: for a file that can't be read, or a line that is no example.
    """
    if path.is_dir():
        paths = sorted(child for child in path.iterdir() if re.search(r"\.jsonl?(\.gz)?$", child.name))
        if not paths:
            raise TrainingDataError(f"{path} holds no .jsonl file")
    else:
        paths = [path]
    examples = []
    for file in paths:
        group = file.name.partition(".")[0]
        instructions = _e5_instructions(group) if e5 else [""]
        for number, (line, value) in enumerate(_values(file, plain=False)):
            instruction = instructions[number % len(instructions)]
            examples.append(_example_of(value, f"{file}, {line}", needs, group, instruction))
    return examples


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
        if isinstance(config, SupervisedConfig):
            needs = Needs.of(config)
            return [_example_of(row, f"{where}, row {number}", needs) for number, row in enumerate(rows, 1)]
        column = "text" if "text" in rows.column_names else rows.column_names[0]
        texts = [text.strip() for text in rows[column] if text and text.strip()]
        return [Example(text, (text,)) for text in texts] if isinstance(config, SimcseConfig) else texts

    return examples("train"), examples("validation") if evaluated else []


def _example_of(value: Any, where: str, needs: Needs, group: str = "", instruction: str = "") -> Example:
    """The example that a JSON object holds; the `instruction` is for an object without its own.

    Raises:
        TrainingDataError: if the object holds no example, or lacks something that the loss needs.
    """
    if not isinstance(value, dict):
        raise TrainingDataError(f"{where}: an example must be an object with query and positive, not {_kind(value)}")
    found = {}
    for field, names in _FIELDS.items():
        name = next((name for name in names if value.get(name) is not None), None)
        if name is not None:
            found[field] = name
    for field in ("query", "positive"):
        if field not in found:
            raise TrainingDataError(f"{where}: there is no {field!r} among {', '.join(map(repr, value))}")
    texts = {field: _texts(value, found, field, where) for field in _FIELDS if field != "scores"}
    negatives = texts["negative"] + _numbered_negatives(value, where)
    if needs.negatives and not negatives:
        raise TrainingDataError(f"{where}: there is no negative, and distillation_loss compares passages of a query")
    scores = _scores(value, found, len(texts["positive"] + negatives), where) if needs.scores else ()
    own = "".join(texts["instruction"]) or instruction
    of_passages = "".join(texts["passage_instruction"])
    return Example(texts["query"][0], texts["positive"], negatives, own, of_passages, group, scores)


def _texts(value: dict[str, Any], found: dict[str, str], field: str, where: str) -> tuple[str, ...]:
    """The texts of a field; () if the object has no such field. Only positives and negatives may be several."""
    if field not in found:
        return ()
    name = found[field]
    several = isinstance(value[name], list) and field in ("positive", "negative")
    texts = value[name] if several else [value[name]]
    if not texts and field == "positive":
        raise TrainingDataError(f"{where}: {name} must be a string, not nothing")
    for text in texts:
        if not isinstance(text, str):
            raise TrainingDataError(f"{where}: {name} must be a string, not {_kind(text)}")
        if field in ("query", "positive", "negative") and not text.strip():
            raise TrainingDataError(f"{where}: {name} is empty")
    return tuple(texts)


def _numbered_negatives(value: dict[str, Any], where: str) -> tuple[str, ...]:
    """negative_1, negative_2 and so on, as sentence-transformers' mine_hard_negatives names them."""
    names = [name for name in value if re.fullmatch(r"negative_\d+", name) and value[name] is not None]
    names.sort(key=lambda name: int(name.removeprefix("negative_")))
    return tuple(text for name in names for text in _texts(value, {"negative": name}, "negative", where))


def _scores(value: dict[str, Any], found: dict[str, str], passages: int, where: str) -> tuple[float, ...]:
    """A teacher's scores under one name, or those of positives and of negatives apart."""
    name = found.get("scores", "pos_scores")
    scores = value.get(name)
    if name == "pos_scores" and isinstance(scores, list):
        scores = [*scores, *(value.get("neg_scores") or [])]
    if scores is None:
        raise TrainingDataError(
            f"{where}: there are no 'scores' among {', '.join(map(repr, value))}, and distillation_loss needs a "
            "teacher's: give them, or a teacher_url or teacher_model"
        )
    if not isinstance(scores, list) or not all(
        type(score) in (int, float) and abs(score) < _INFINITE for score in scores
    ):
        raise TrainingDataError(f"{where}: {name} must be a list of finite numbers, not {_kind(scores)}")
    if len(scores) != passages:
        raise TrainingDataError(
            f"{where}: {name} has {len(scores)} numbers for {passages} passages: give one for each positive, then one "
            "for each negative"
        )
    return tuple(map(float, scores))


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
