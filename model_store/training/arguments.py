"""The keys of transformers' TrainingArguments that the trainer honours, and the values that each may have.

transformers itself accepts any value of any type, and fails on it only after a model is loaded. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# How configurations are read: "3e-5" is no number, true is no whole number, and NaN is not allowed.
AS_WRITTEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_Weight = Annotated[float, Field(ge=0)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_When = Literal["no", "steps", "epoch"]
_LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]


class Arguments(BaseModel):
    """The keys of a configuration. A key that is not given is left to transformers; the defaults here are not used."""

    model_config = AS_WRITTEN

    # The length of the run, and its speed.
    max_steps: Annotated[int, Field(ge=1)] | Literal[-1] = -1
    num_train_epochs: float = Field(default=3, gt=0)
    per_device_train_batch_size: _Positive = 8
    per_device_eval_batch_size: _Positive = 8
    gradient_accumulation_steps: _Positive = 1
    learning_rate: _Weight = 5e-5
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "greedy",
    ] = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: _Weight = 0
    warmup_ratio: _Decay = 0
    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch"
    adam_beta1: _Decay = 0.9
    adam_beta2: _Decay = 0.999
    adam_epsilon: _Weight = 1e-8
    weight_decay: _Weight = 0
    max_grad_norm: _Weight = 1
    seed: int = Field(default=42, ge=0, lt=1 << 32)
    full_determinism: bool = False

    # Evaluation, logs and checkpoints.
    do_eval: bool = False
    eval_strategy: _When = "no"
    eval_steps: _Weight | None = None
    eval_delay: _Weight = 0
    eval_on_start: bool = False
    logging_strategy: _When = "steps"
    logging_steps: _Weight = 500
    logging_first_step: bool = False
    logging_nan_inf_filter: bool = True
    log_level: _LogLevel = "passive"
    log_level_replica: _LogLevel = "warning"
    log_on_each_node: bool = True
    report_to: str | list[str] = "tensorboard"
    run_name: str | None = None
    disable_tqdm: bool | None = None
    save_strategy: _When | Literal["best"] = "steps"
    save_steps: _Weight = 500
    save_total_limit: _Positive | None = None
    save_only_model: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None

    # The machine.
    bf16: bool = False
    tf32: bool | None = None
    use_cpu: bool = False
    torch_empty_cache_steps: _Positive | None = None
    dataloader_num_workers: _Count = 0
    dataloader_persistent_workers: bool = False
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: _Positive | None = None
    ddp_backend: Literal["gloo", "hccl", "mpi", "nccl", "ucc", "xccl"] | None = None
    ddp_bucket_cap_mb: _Positive | None = None
    ddp_timeout: _Positive = 1800


# The value that is needed, by pydantic's name for the mistake. The braces are filled with pydantic's limit.
_NEEDED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:.10g}",
    "greater_than_equal": "a number of at least {ge:.10g}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt:.10g}",
    "less_than_equal": "a number of at most {le:.10g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "path_type": "a path",
    "string_too_short": "a name",
    "string_type": "a string",
}


def sentences(error: ValidationError) -> Iterator[str]:
    """A sentence for each key with a bad value: the value, and what to write instead."""
    needed: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for issue in error.errors():
        key = str(issue["loc"][0]) if issue["loc"] else ""
        if issue["type"] == "missing":
            yield f"{key} is missing"
        elif issue["type"] in _NEEDED:
            values[key] = json.dumps(issue["input"])[:60]
            needed.setdefault(key, []).append(_NEEDED[issue["type"]].format(**issue.get("ctx", {})))
        else:
            yield issue["msg"].removeprefix("Value error, ")
    for key, ways in needed.items():
        yield f"{key} is {values[key]}: write {' or '.join(dict.fromkeys(ways))}"
