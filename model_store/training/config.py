"""A training run's configuration: the JSON files of the official LLM2Vec scripts, read as they are.

Their keys are of two kinds: the scripts' own, and those of transformers' TrainingArguments. Each key is honoured, or
refused with the way out. A key that has nothing to decide here is accepted, and `notes` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from model_store.errors import UserError
from model_store.pooling_modes import PoolingMode
from model_store.text.files import read_json
from model_store.training.arguments import AS_WRITTEN, Arguments, sentences
from model_store.training.objective import Distillation, Objective

Stage = Literal["mntp", "simcse", "supervised"]

_Path = Annotated[Path, Field(strict=False)]


class TrainingConfigError(UserError):
    """A configuration that can't run; the message names the key and the way out."""


class _Config(BaseModel):
    """The keys of every stage. `arguments` are the given keys of TrainingArguments; `file` is the file of all keys."""

    model_config = AS_WRITTEN

    stage: ClassVar[Stage]

    model_name_or_path: str = Field(min_length=1)
    model_revision: str = "main"
    output_dir: _Path
    torch_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    bidirectional: bool | None = None

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    cache_dir: str | None = None
    train_file: _Path | None = None
    validation_file: _Path | None = None
    validation_split_percentage: int | None = Field(default=None, ge=0, lt=100)
    max_train_samples: int | None = Field(default=None, ge=1)
    max_eval_samples: int | None = Field(default=None, ge=1)
    max_seq_length: int | None = Field(default=None, ge=2)

    lora_r: int = Field(default=8, ge=1)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    stop_after_n_steps: int | None = Field(default=10000, ge=1)
    gradient_checkpointing: bool = False

    arguments: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    file: Path | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _can_run(self) -> _Config:
        if self.train_file is None and self.dataset_name is None:
            raise ValueError("there is nothing to train on: give train_file, or a dataset_name")
        name = self.arguments.get("metric_for_best_model")
        if name is not None and name.removeprefix("eval_") not in self.metrics:
            raise ValueError(f'metric_for_best_model is "{name}": write {" or ".join(self.metrics)}')
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of an evaluation."""
        return ("loss", "accuracy")

    @property
    def base(self) -> str:
        """The base's reference, as `sources.resolve` reads it."""
        return self.model_name_or_path + ("" if self.model_revision == "main" else f"@{self.model_revision}")


class MntpConfig(_Config):
    """Masked next token prediction (BehnamGhader et al. 2024)."""

    stage = "mntp"

    mask_token_type: Literal["blank", "eos", "mask"] = "blank"
    data_collator_type: Literal["default", "all_mask"] = "default"
    mlm_probability: float = Field(default=0.15, gt=0, le=1)
    line_by_line: bool = False


class _ContrastiveConfig(_Config):
    peft_model_name_or_path: str | None = Field(default=None, min_length=1)
    pooling_mode: PoolingMode | None = None
    loss_scale: float = Field(default=50.0, gt=0)
    absolute_margin: float | None = None
    relative_margin: float | None = None
    matryoshka_dims: list[Annotated[int, Field(ge=1)]] | None = None
    matryoshka_weights: list[Annotated[float, Field(ge=0)]] | None = None
    gradient_cache_chunk_size: int | None = Field(default=None, ge=1)
    eval_sts_file: _Path | None = None

    @model_validator(mode="after")
    def _weights_are_of_dims(self) -> _ContrastiveConfig:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is not None and (not dims or len(set(dims)) < len(dims)):
            raise ValueError(f"matryoshka_dims is {dims}: write each width once, or leave it out for the whole width")
        if weights is not None and len(weights) != len(dims or ()):
            raise ValueError(f"matryoshka_weights has {len(weights)} weights for {len(dims or ())} matryoshka_dims")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of an evaluation; a correlation needs pairs."""
        return ("loss", "spearman") if self.eval_sts_file else ("loss",)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        dims = self.matryoshka_dims or []
        widths = tuple(zip(dims, self.matryoshka_weights or [1.0] * len(dims), strict=True))
        return Objective(self.loss_scale, self.absolute_margin, self.relative_margin, widths)


class SimcseConfig(_ContrastiveConfig):
    """Unsupervised SimCSE (Gao et al. 2021): a text and itself under another dropout."""

    stage = "simcse"

    simcse_dropout: float = Field(default=0.1, gt=0, lt=1)


class SupervisedConfig(_ContrastiveConfig):
    """Queries with positives and negatives, with in-batch negatives, a teacher, or both."""

    stage = "supervised"

    distillation_loss: Distillation | None = None
    contrastive_weight: float = Field(default=1.0, ge=0)
    distillation_weight: float = Field(default=1.0, gt=0)
    student_temperature: float = Field(default=1.0, gt=0)
    teacher_temperature: float = Field(default=1.0, gt=0)
    teacher_url: str | None = Field(default=None, min_length=1)
    teacher_model: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _teacher_is_used(self) -> SupervisedConfig:
        given = self.model_fields_set
        if self.teacher_url and self.teacher_model:
            raise ValueError("teacher_url and teacher_model are two teachers: leave out one")
        if self.distillation_loss is None:
            if unused := sorted(given & _OF_DISTILLATION):
                raise ValueError(f"{unused[0]} does nothing without distillation_loss: give that, or leave this out")
            if self.has_teacher and self.absolute_margin is None and self.relative_margin is None:
                raise ValueError("a teacher does nothing without distillation_loss, absolute_margin or relative_margin")
        elif self.distillation_loss == "EmbedDistillLoss":
            if not self.has_teacher:
                raise ValueError("EmbedDistillLoss needs a teacher's vectors: give teacher_url or teacher_model")
            if unused := sorted(given & _OF_SCORES):
                raise ValueError(f"{unused[0]} does nothing with EmbedDistillLoss, which knows no scores: leave it out")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher gives vectors, and not only the data its scores."""
        return bool(self.teacher_url or self.teacher_model)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return replace(
            super().objective,
            distillation=self.distillation_loss,
            contrastive_weight=self.contrastive_weight,
            distillation_weight=self.distillation_weight,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )


_OF_SCORES = {"student_temperature", "teacher_temperature"}
_OF_DISTILLATION = {"contrastive_weight", "distillation_weight", *_OF_SCORES}

TrainingConfig = MntpConfig | SimcseConfig | SupervisedConfig
_STAGES: dict[Stage, type[TrainingConfig]] = {kind.stage: kind for kind in (MntpConfig, SimcseConfig, SupervisedConfig)}

# Keys for something that always holds here, or for a method that packed training does not need.
_NOTHING_TO_DECIDE = {
    "attn_implementation": "packed attention takes the fastest kernel of this device",
    "low_cpu_mem_usage": "",
    "overwrite_cache": "tokens are not cached",
    "pad_to_max_length": "nothing is padded",
    "preprocessing_num_workers": "texts are tokenized batch by batch",
    "remove_unused_columns": "",
    "use_fast_tokenizer": "tokenizer.json is used as it is",
    "experiment_id": "output_dir is used as given",
    "dataloader_drop_last": "every batch is a full one",
    "ddp_find_unused_parameters": "there are none",
    "ddp_broadcast_buffers": "there are none that change",
    "group_by_length": "packed batches have no padding to save",
    "fp16_full_eval": "",
}

# Keys with only one supported value: that value, and the way out for any other.
_ONLY: dict[str, tuple[Any, str]] = {
    "loss_class": ("HardNegativeNLLLoss", "HardNegativeNLLLoss is the only one"),
    "do_train": (True, "set it true, or leave it out"),
    "do_predict": (False, "leave it out"),
    "trust_remote_code": (False, "remote code never runs: set it false"),
    "streaming": (False, "write the texts to a train_file"),
    "fp16": (False, "set torch_dtype to bfloat16: half precision would need scaled losses"),
    "token": (None, "set the variable HF_TOKEN"),
    "use_auth_token": (None, "set the variable HF_TOKEN"),
    "tokenizer_name": (None, "the base's tokenizer is used"),
    "config_name": (None, "the base's configuration is used"),
    "config_overrides": (None, "the base's configuration is used"),
    "model_type": (None, "the base's configuration is used"),
}

_RENAMED = {
    "dataset_file_path": "train_file",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "activation_checkpointing": "gradient_checkpointing",
}

# Fields of the configuration classes that are no keys of a file.
_NOT_KEYS = ("arguments", "notes", "file")


def read_config(stage: Stage, path: Path) -> TrainingConfig:
    """The configuration in a JSON file.

    Raises:
        TrainingConfigError: for bad JSON, an unknown key (naming the nearest), or a value that can't be honoured.
    """
    given = read_json(path, TrainingConfigError)
    if not isinstance(given, dict):
        raise TrainingConfigError(f"{path} is not a JSON object")
    try:
        return parse_config(stage, given).model_copy(update={"file": path})
    except TrainingConfigError as error:
        raise TrainingConfigError(f"{path}: {error}") from error


def parse_config(stage: Stage, given: dict[str, Any]) -> TrainingConfig:
    """The configuration in a JSON object; see `read_config`."""
    config_class = _STAGES[stage]
    own: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in _renamed(given):
        if key in config_class.model_fields and key not in _NOT_KEYS:
            own[key] = value
        elif key in _NOTHING_TO_DECIDE:
            if reason := _NOTHING_TO_DECIDE[key]:
                notes.append(f"{key} is not used: {reason}")
        elif key in _ONLY:
            only, way_out = _ONLY[key]
            if value != only:
                shown = key if "token" in key else f"{key} {json.dumps(value)}"
                raise TrainingConfigError(f"{shown} is not supported: {way_out}")
        elif key in Arguments.model_fields:
            arguments[key] = value
        else:
            _refuse_key(stage, key, value)
    try:
        Arguments(**arguments)
        if arguments.pop("bf16", False) and "torch_dtype" not in own:
            own["torch_dtype"] = "bfloat16"
            notes.append("bf16 is read as torch_dtype bfloat16: the adapters are updated in float32 copies")
        if own.get("torch_dtype", "") is None:
            del own["torch_dtype"]
        return config_class(**own, arguments=arguments, notes=tuple(notes))
    except ValidationError as error:
        raise TrainingConfigError("; ".join(sentences(error))) from error


def _renamed(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        name = _RENAMED.get(key, key)
        if name != key and name in given:
            raise TrainingConfigError(f"{key} and {name} are the same: leave out {key}")
        yield name, value


def _refuse_key(stage: Stage, key: str, value: Any) -> None:
    """Raise, unless the key's value is transformers' own default."""
    from transformers import TrainingArguments

    others = [other for other in _STAGES if key in _STAGES[other].model_fields]
    if others:
        raise TrainingConfigError(f"{key} is a key of {' and '.join(others)}, not of {stage}: leave it out")
    fields = TrainingArguments.__dataclass_fields__
    if key in fields:
        if value == fields[key].default:
            return
        raise TrainingConfigError(f"{key} {json.dumps(value)} is not supported: leave it out")
    known = {*_STAGES[stage].model_fields, *Arguments.model_fields, *_NOTHING_TO_DECIDE, *_ONLY, *_RENAMED}
    nearest = get_close_matches(key, known - {*_NOT_KEYS}, n=1, cutoff=0)[0]
    raise TrainingConfigError(f"there is no key {key!r}: the nearest is {nearest!r}")
