"""Decides where a run begins: in an empty folder, or at the newest complete checkpoint of the same run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from model_store.build.build import TRAINING_CONFIG_FILE
from model_store.training.config import TrainingConfig, TrainingConfigError

# Keys that don't change the result of a run.
_FREE_TO_CHANGE = ("notes", "output_dir", "cache_dir", "eval_sts_file")
_FREE_ARGUMENTS = re.compile(
    r"(logging|log|save|eval|per_device_eval|dataloader|ddp|resume|overwrite|report|run)_.*|disable_tqdm"
)


# What is written of a run beside its configuration: see `_begun`.
_PROCESSES, _DATA = "processes", "train_data_sha256"


def whole_checkpoints(folder: Path, processes: int = 1) -> list[Path]:
    """The checkpoints from which a run can go on, oldest first. Half-written checkpoints are left out."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    random_states = [f"rng_state_{index}.pth" for index in range(processes)] if processes > 1 else ["rng_state.pth"]
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt", *random_states)
    whole = [path for path in found if all((path / name).is_file() for name in needed)]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def begin(
    config: TrainingConfig, arguments: TrainingArguments, training_data: Iterable[Any], resume: bool
) -> str | None:
    """Make output_dir ready. Returns the checkpoint to go on from, or None."""
    folder, main = config.output_dir, arguments.process_index == 0
    asked = config.arguments.get("resume_from_checkpoint")
    overwrite = bool(config.arguments.get("overwrite_output_dir"))
    resume = resume or bool(asked)
    begun = _begun(config, arguments.world_size, training_data)
    with arguments.main_process_first(desc="looking for a checkpoint"):
        if (resume or not overwrite) and any(folder.glob("checkpoint-*")):
            _refuse_other_run(begun, folder / TRAINING_CONFIG_FILE)
        whole = whole_checkpoints(folder, arguments.world_size)
        if isinstance(asked, str):
            near = whole_checkpoints(Path(asked).parent, arguments.world_size)
            whole = [path for path in near if path.name == Path(asked).name]
            if not whole:
                raise TrainingConfigError(
                    f"resume_from_checkpoint {asked} is no whole checkpoint: set it true or leave it out"
                )
        if whole and (resume or not overwrite):
            if main:
                print(f"going on from {whole[-1]}")
            return str(whole[-1])
        if not main:
            return None
        if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
            raise TrainingConfigError(f"{folder} is not empty: set overwrite_output_dir true, or choose another place")
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
        for old in () if resume else folder.glob("teacher-*.npy"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAINING_CONFIG_FILE).write_text(json.dumps(begun, indent=2) + "\n")
        for note in config.notes:
            print(note)
    return None


def _begun(config: TrainingConfig, processes: int, training_data: Iterable[Any]) -> dict[str, Any]:
    """All that the result of a run depends on: its configuration, its processes and the content of its data."""
    content = hashlib.sha256()
    for example in training_data:
        content.update(repr(example).encode() + b"\n")
    return {**json.loads(config.model_dump_json()), _PROCESSES: processes, _DATA: content.hexdigest()}


def _refuse_other_run(now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with anything else than the run began with: the result would be another one."""
    if not path.is_file():
        return
    then = json.loads(path.read_text())
    before, given = then.get("arguments", {}), now["arguments"]
    changed = [key for key in now if key not in ("arguments", *_FREE_TO_CHANGE) and now[key] != then.get(key)]
    changed += [
        key
        for key in sorted(before.keys() | given.keys())
        if before.get(key) != given.get(key) and not _FREE_ARGUMENTS.fullmatch(key)
    ]
    words = {
        _PROCESSES: f"number of processes ({then.get(_PROCESSES)}, and now {now[_PROCESSES]})",
        _DATA: "content of the training data",
    }
    if changed:
        raise TrainingConfigError(
            f"the run in {path.parent} was begun with another {', '.join(words.get(key, key) for key in changed)}: "
            "put it back to go on, or set overwrite_output_dir true and leave out --resume to begin anew"
        )
