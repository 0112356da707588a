"""The examples of a configuration: the training examples and the held-out ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import TrainingArguments

from model_store.evaluation.sts import ScoredPair, read_pairs
from model_store.training.config import MntpConfig, TrainingConfig, TrainingConfigError
from model_store.training.texts import TrainingDataError, read_texts, read_triplets, triplet_of

# The default percentage of texts held out, as in the official scripts.
_DEFAULT_HELD_OUT = {"mntp": 5, "simcse": 0, "supervised": 0}


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
            return [triplet_of(row, f"{where}, row {number}", "") for number, row in enumerate(rows, 1)]
        column = "text" if "text" in rows.column_names else rows.column_names[0]
        return [text.strip() for text in rows[column] if text and text.strip()]

    return examples("train"), examples("validation") if evaluated else []
