"""Configurations of the official scripts, as people have them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from runpy import run_path
from typing import Any, get_args

import pytest
from transformers import SchedulerType, TrainingArguments

from model_store.evaluation.files import DatasetError
from model_store.training.arguments import Arguments
from model_store.training.config import (
    _NOT_KEYS,
    _STAGES,
    MntpConfig,
    SimcseConfig,
    Stage,
    SupervisedConfig,
    TrainingConfigError,
    parse_config,
    read_config,
)
from model_store.training.run import train, training_arguments

# The keys of the configurations that are published with LLM2Vec (train_configs/), and values of theirs.
MNTP = {
    "dataset_name": "wikitext",
    "dataset_config_name": "wikitext-103-raw-v1",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "do_train": True,
    "do_eval": True,
    "max_seq_length": 512,
    "mask_token_type": "blank",
    "data_collator_type": "default",
    "mlm_probability": 0.2,
    "overwrite_output_dir": True,
    "evaluation_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 200,
    "stop_after_n_steps": 1000,
    "lora_r": 16,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
}
SIMCSE = {
    "simcse_dropout": 0.3,
    "bidirectional": True,
    "pooling_mode": "mean",
    "dataset_name": "Wiki1M",
    "dataset_file_path": "cache/wiki1m_for_simcse.txt",
    "remove_unused_columns": False,
    "learning_rate": 3e-5,
    "loss_scale": 20,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "do_train": True,
    "disable_tqdm": False,
    "max_seq_length": 128,
    "overwrite_output_dir": True,
    "logging_steps": 50,
    "save_steps": 200,
    "save_only_model": True,
    "stop_after_n_steps": 1000,
    "lora_r": 16,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "seed": 42,
}
SUPERVISED = {
    **{key: value for key, value in SIMCSE.items() if key not in ("simcse_dropout", "loss_scale")},
    "dataset_name": "E5",
    "dataset_file_path": "cache/echo-data",
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "warmup_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_seq_length": 512,
}
PUBLISHED: dict[Stage, dict[str, Any]] = {"mntp": MNTP, "simcse": SIMCSE, "supervised": SUPERVISED}
BASES = {
    "princeton-nlp/Sheared-LLaMA-1.3B": "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp",
    "mistralai/Mistral-7B-Instruct-v0.2": "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp",
    "meta-llama/Llama-2-7b-chat-hf": "McGill-NLP/LLM2Vec-Llama-2-7b-chat-hf-mntp",
    "meta-llama/Meta-Llama-3-8B-Instruct": "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
}


def published(stage: Stage, base: str, folder: Path, **changes: Any) -> dict[str, Any]:
    config = {"model_name_or_path": base, "output_dir": str(folder / "out"), **PUBLISHED[stage], **changes}
    if stage != "mntp":
        config["peft_model_name_or_path"] = BASES[base]
    return config


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stage", PUBLISHED)
def test_official_configurations_are_read(stage: Stage, base: str, tmp_path: Path) -> None:
    given = published(stage, base, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    config = read_config(stage, path)
    arguments = training_arguments(config)
    assert config.model_name_or_path == base
    assert (config.lora_r, config.torch_dtype, config.gradient_checkpointing) == (16, "bfloat16", True)
    assert config.stop_after_n_steps == 1000
    assert arguments.per_device_train_batch_size == given["per_device_train_batch_size"]
    assert arguments.save_steps == 200
    assert [note for note in config.notes if "attn_implementation" in note]
    if isinstance(config, MntpConfig):
        assert (config.mlm_probability, config.data_collator_type, config.mask_token_type) == (0.2, "default", "blank")
        assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", 100)
        assert config.dataset_config_name == "wikitext-103-raw-v1"
    elif isinstance(config, SimcseConfig):
        assert (config.simcse_dropout, config.loss_scale) == (0.3, 20)
        assert config.train_file == Path("cache/wiki1m_for_simcse.txt")
        assert config.peft_model_name_or_path == BASES[base]
    else:
        assert isinstance(config, SupervisedConfig)
        assert (arguments.num_train_epochs, arguments.warmup_steps) == (3, 300)
        assert config.train_file == Path("cache/echo-data")


def refused(stage: Stage, folder: Path, **changes: Any) -> str:
    with pytest.raises(TrainingConfigError) as caught:
        training_arguments(parse_config(stage, published(stage, "princeton-nlp/Sheared-LLaMA-1.3B", folder, **changes)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("mntp", {"mlm_probabilty": 0.2}, "there is no key 'mlm_probabilty': the nearest is 'mlm_probability'"),
        ("mntp", {"lora_rank": 8}, "'lora_r'"),
        ("mntp", {"learn_rate": 1e-4}, "'learning_rate'"),
        ("mntp", {"simcse_dropout": 0.3}, "simcse_dropout is a key of simcse, not of mntp"),
        ("simcse", {"mask_token_type": "blank"}, "mask_token_type is a key of mntp, not of simcse"),
        ("simcse", {"bidirectional": "no"}, "bidirectional"),
        ("simcse", {"train_file": "other.txt"}, "dataset_file_path and train_file are the same"),
        ("simcse", {"pooling_mode": "max"}, "pooling_mode"),
        ("simcse", {"loss_class": "Cosine"}, "HardNegativeNLLLoss is the only one"),
        ("mntp", {"torch_dtype": "float16"}, """torch_dtype is "float16": write 'auto', 'bfloat16' or 'float32'"""),
        ("mntp", {"fp16": True}, "set torch_dtype to bfloat16"),
        ("mntp", {"token": "hf_secret"}, "HF_TOKEN"),
        ("mntp", {"deepspeed": "zero3.json"}, "deepspeed"),
        ("mntp", {"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1 is not supported"),
        ("mntp", {"optim": "adafactor"}, "write 'adamw_torch' or"),
        ("mntp", {"trust_remote_code": True}, "remote code never runs"),
        ("mntp", {"mlm_probability": 1.5}, "mlm_probability is 1.5: write a number of at most 1"),
        ("mntp", {"mask_token_type": "underscore"}, "'blank', 'eos' or 'mask'"),
        ("mntp", {"save_strategy": "sometimes"}, "sometimes"),
        ("mntp", {"dataset_name": None}, "there is nothing to train on"),
        ("mntp", {"matryoshka_dims": [64]}, "matryoshka_dims is a key of simcse and supervised, not of mntp"),
        ("simcse", {"teacher_url": "http://a"}, "teacher_url is a key of supervised, not of simcse"),
        ("simcse", {"matryoshka_dims": []}, "matryoshka_dims is []: write each width once, or leave it out"),
        ("simcse", {"matryoshka_dims": [64, 64]}, "matryoshka_dims is [64, 64]: write each width once"),
        ("simcse", {"matryoshka_dims": [64, 0]}, "matryoshka_dims is 0: write a number of at least 1"),
        ("simcse", {"matryoshka_weights": [1]}, "matryoshka_weights has 1 weights for 0 matryoshka_dims"),
        ("supervised", {"distillation_loss": "KL"}, "write 'DistillKLDivLoss', 'MarginMSELoss' or 'EmbedDistillLoss'"),
        ("supervised", {"contrastive_weight": 0}, "contrastive_weight does nothing without distillation_loss"),
        (
            "supervised",
            {"teacher_url": "http://a"},
            "a teacher does nothing without distillation_loss, absolute_margin",
        ),
        ("supervised", {"distillation_loss": "EmbedDistillLoss"}, "EmbedDistillLoss needs a teacher's vectors: give"),
        (
            "supervised",
            {"distillation_loss": "EmbedDistillLoss", "teacher_model": "a", "student_temperature": 2},
            "student_temperature does nothing with EmbedDistillLoss",
        ),
        ("supervised", {"teacher_url": "http://a", "teacher_model": "a"}, "are two teachers: leave out one"),
    ],
)
def test_what_is_not_honoured_is_refused_with_the_way_out(
    stage: Stage, change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert told in refused(stage, tmp_path, **change)


@pytest.mark.parametrize("stage", PUBLISHED)
def test_a_value_of_the_wrong_type_is_refused_for_every_key(stage: Stage, tmp_path: Path) -> None:
    """With the file and the key; null too, unless the key may be without a value."""
    path = tmp_path / "config.json"
    fields = {**_STAGES[stage].model_fields, **Arguments.model_fields}
    for key in fields.keys() - _NOT_KEYS:
        good = {"model_name_or_path": "org/base", "train_file": "a.txt", "output_dir": "out"}
        path.write_text(json.dumps({**good, key: 5 if key == "lr_scheduler_kwargs" else {"no": "value"}}))
        with pytest.raises(TrainingConfigError, match=rf"config\.json: {key} is .*: write ."):
            read_config(stage, path)
        without = type(None) in get_args(fields[key].annotation) or key == "torch_dtype"
        path.write_text(json.dumps({**good, "dataset_name": "org/set", key: None}))
        if without:
            read_config(stage, path)
        else:
            with pytest.raises(TrainingConfigError, match=rf"config\.json: {key} is null: write ."):
                read_config(stage, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": "3e-5"}, 'learning_rate is "3e-5": write a number'),
        ({"learning_rate": -1}, "learning_rate is -1: write a number of at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is NaN: write a finite number"),
        ({"max_steps": 1.5}, "max_steps is 1.5: write a whole number"),
        ({"max_steps": 0}, "max_steps is 0: write a number of at least 1 or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0: write a number above 0"),
        ({"seed": None}, "seed is null: write a whole number"),
        ({"seed": True}, "seed is true: write a whole number"),
        ({"seed": 1 << 32}, "seed is 4294967296: write a number below 4294967296"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: write a number of at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: write a number of at least 1"),
        ({"adam_beta2": 1}, "adam_beta2 is 1: write a number below 1"),
        ({"gradient_checkpointing": "yes"}, 'gradient_checkpointing is "yes": write true or false'),
        ({"lora_r": "16"}, 'lora_r is "16": write a whole number'),
        ({"report_to": 5}, "report_to is 5: write a string or a list"),
        ({"report_to": ["tensorboard", "nonesuch"]}, 'report_to is "nonesuch", which is not installed here: write '),
        ({"lr_scheduler_type": "cosin"}, """lr_scheduler_type is "cosin": write 'linear', 'cosine'"""),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "does not go with lr_scheduler_kwargs null: One of min_lr or"),
        ({"lr_scheduler_kwargs": {"num_cycle": 2}}, 'does not go with lr_scheduler_kwargs {"num_cycle": 2}: '),
        ({"metric_for_best_model": "acuracy"}, 'metric_for_best_model is "acuracy": write loss or accuracy'),
        ({"logging_steps": 2.5}, "logging_steps must be an integer"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end requires the save and eval strategy to match"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_before_anything_is_loaded(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    good = {"model_name_or_path": "no/base", "train_file": "none.txt", "output_dir": str(tmp_path / "out")}
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(TrainingConfigError) as caught:
        train(read_config("mntp", path))
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_run_is_measured_on_is_read_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("score\tsentence1\tsentence2\n1\ta\tb\n2\ta\tc\n")
    given = {
        "model_name_or_path": "no/base",
        "train_file": str(tmp_path / "a.txt"),
        "output_dir": str(tmp_path / "out"),
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "eval_sts_file": str(pairs),
        "overwrite_output_dir": True,
    }
    with pytest.raises(TrainingConfigError, match="metric_for_best_model is loss, but nothing is held out"):
        train(parse_config("simcse", given))
    pairs.write_text("score\tsentence1\tsentence2\n1\ta\tb\nnan\ta\tc\n")
    with pytest.raises(DatasetError, match=r"pairs\.tsv, line 3: score is 'nan', not a number"):
        train(parse_config("simcse", given))


def test_every_schedule_and_key_is_one_of_transformers() -> None:
    schedules = get_args(Arguments.model_fields["lr_scheduler_type"].annotation)
    assert {*schedules} == {kind.value for kind in SchedulerType}
    assert Arguments.model_fields.keys() - TrainingArguments.__dataclass_fields__.keys() == {
        "overwrite_output_dir",
        "warmup_ratio",
    }


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps(published("mntp", "org/base", tmp_path)), encoding="utf-8")
    assert read_config("mntp", path).model_name_or_path == "org/base"


def test_what_transformers_does_anyway_is_accepted(tmp_path: Path) -> None:
    changes = {"label_smoothing_factor": 0.0, "push_to_hub": False, "pad_to_max_length": True, "warmup_ratio": 0.1}
    config = parse_config("mntp", published("mntp", "princeton-nlp/Sheared-LLaMA-1.3B", tmp_path, **changes))
    assert "pad_to_max_length is not used: nothing is padded" in config.notes
    assert training_arguments(config).get_warmup_steps(200) == 20


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    assert "hf_secret" not in refused("mntp", tmp_path, token="hf_secret")


def test_bf16_is_a_dtype(tmp_path: Path) -> None:
    given = published("mntp", "princeton-nlp/Sheared-LLaMA-1.3B", tmp_path, bf16=True)
    del given["torch_dtype"]
    assert parse_config("mntp", given).torch_dtype == "bfloat16"


@pytest.mark.parametrize(("content", "told"), [("{", "not valid JSON"), ("[]", "not a JSON object")])
def test_bad_files_are_named(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(TrainingConfigError, match=told) as caught:
        read_config("mntp", path)
    assert str(path) in str(caught.value)
    with pytest.raises(TrainingConfigError, match="can't be read"):
        read_config("mntp", tmp_path / "none.json")


@pytest.mark.parametrize("supervised", [False, True])
def test_the_example_s_configurations_are_read(supervised: bool, tmp_path: Path) -> None:
    """Of examples/train_encoder.py."""
    options = Namespace(
        base="org/base",
        texts=tmp_path / "texts.txt",
        sentences=None,
        triplets=tmp_path / "triplets.jsonl" if supervised else None,
        sts=tmp_path / "pairs.tsv",
        steps=500,
    )
    example = run_path(str(Path(__file__).parents[3] / "examples" / "train_encoder.py"))
    first = parse_config("mntp", example["mntp"](options, tmp_path / "mntp"))
    stage: Stage = "supervised" if supervised else "simcse"
    second = parse_config(stage, example["contrastive"](options, first.output_dir, tmp_path / "second"))
    for config in (first, second):
        assert training_arguments(config).max_steps == 500
    assert isinstance(second, SimcseConfig | SupervisedConfig)
    assert second.peft_model_name_or_path == str(first.output_dir)
    assert second.train_file == (options.triplets or options.texts)
