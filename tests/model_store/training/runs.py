"""Small training runs for tests: bases, texts and configurations, and a process that is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from model_store.training.config import Stage, parse_config
from model_store.training.run import train
from tests.tiny import save_base

_TEXT = "the river ran past the mill and ground the corn of the valley while a man plays a flute as a plane takes off"
WORDS = sorted(set(_TEXT.split()))


# Of a supervised run on the texts of `write_scored`.
EVERY_LOSS: dict[str, Any] = {
    "absolute_margin": -0.1,
    "relative_margin": -0.5,
    "matryoshka_dims": [16, 64, 32],
    "matryoshka_weights": [0.5, 1, 1],
    "distillation_loss": "DistillKLDivLoss",
    "distillation_weight": 100,
    "student_temperature": 0.1,
    "gradient_cache_chunk_size": 5,
}


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of 3 to 22 words, each another."""
    return [
        " ".join(WORDS[(seed + n * 7 + k * (n % 5 + 1)) % len(WORDS)] for k in range(3 + n % 20)) for n in range(count)
    ]


def write_texts(path: Path, count: int = 64) -> Path:
    """A file of `texts`."""
    path.write_text("\n".join(texts(count)) + "\n")
    return path


def write_triplets(path: Path, count: int = 64) -> Path:
    """A file of triplets."""
    rows = [
        {"query": query, "positive": positive, "negative": negative, "instruction": "Find it:"}
        for query, positive, negative in zip(texts(count), texts(count, 1), texts(count, 2), strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_scored(path: Path, count: int = 64) -> Path:
    """A file of queries with several positives and negatives, and a teacher's score of each."""
    rows = []
    for n, query in enumerate(texts(count)):
        positives, negatives = texts(1 + n % 2, n + 1), texts(1 + n % 3, n + 50)
        scores = [5 + 0.1 * k for k in range(len(positives))] + [-0.5 * k for k in range(len(negatives))]
        rows.append({"query": query, "positive": positives, "negative": negatives, "scores": scores})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(stage: Stage, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of twelve steps on a tiny base; every source of randomness takes part."""
    base, family = folder / "base", changes.pop("family", "llama")
    if not base.exists():
        save_base(base, family)
    data = write_triplets(folder / "data.jsonl") if stage == "supervised" else write_texts(folder / "data.txt")
    own: dict[Stage, dict[str, Any]] = {
        "mntp": {"mlm_probability": 0.3, "mask_token_type": "eos", "line_by_line": True},
        "simcse": {"simcse_dropout": 0.3, "loss_scale": 20},
        "supervised": {"loss_scale": 20},
    }
    return {
        "model_name_or_path": str(base),
        "train_file": str(data),
        "output_dir": str(folder / stage),
        "torch_dtype": "float32",
        "max_seq_length": 48,
        "lora_r": 4,
        "lora_dropout": 0.05,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        **own[stage],
        **changes,
    }


class KillAt(TrainerCallback):  # type: ignore[misc]
    """The process is gone after so many steps, as if its machine were."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # STAGE CONFIG.json STEP: train, and be killed.
    stage, path, step = sys.argv[1:]
    train(parse_config(cast(Stage, stage), json.loads(Path(path).read_text())), callbacks=[KillAt(int(step))])
