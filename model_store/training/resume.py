"""Decides where a run begins: in an empty folder, or at the newest complete checkpoint of the same run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from transformers import TrainingArguments

from model_store.build.build import TRAINING_CONFIG_FILE
from model_store.training.config import TrainingConfig, TrainingConfigError

# Keys that don't change the result of a run.
_FREE_TO_CHANGE = ("notes", "output_dir", "cache_dir", "eval_sts_file")
_FREE_ARGUMENTS = re.compile(
    r"(logging|log|save|eval|per_device_eval|dataloader|ddp|resume|overwrite|report|run)_.*|disable_tqdm"
)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints from which a run can go on, oldest first. Half-written checkpoints are left out."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    whole = [path for path in found if all((path / name).is_file() for name in needed)]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def begin(config: TrainingConfig, arguments: TrainingArguments, resume: bool) -> str | None:
    """Make output_dir ready. Returns the checkpoint to go on from, or None."""
    folder, main = config.output_dir, arguments.process_index == 0
    asked = config.arguments.get("resume_from_checkpoint")
    overwrite = bool(config.arguments.get("overwrite_output_dir"))
    resume = resume or bool(asked)
    with arguments.main_process_first(desc="looking for a checkpoint"):
        whole = whole_checkpoints(folder)
        if isinstance(asked, str):
            whole = [path for path in whole_checkpoints(Path(asked).parent) if path.name == Path(asked).name]
            if not whole:
                raise TrainingConfigError(
                    f"resume_from_checkpoint {asked} is no whole checkpoint: set it true or leave it out"
                )
        if whole and (resume or not overwrite):
            _refuse_other_run(config, folder / TRAINING_CONFIG_FILE)
            if main:
                print(f"going on from {whole[-1]}")
            return str(whole[-1])
        if not main:
            return None
        if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
            raise TrainingConfigError(f"{folder} is not empty: set overwrite_output_dir true, or choose another place")
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAINING_CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
        for note in config.notes:
            print(note)
    return None


def _refuse_other_run(config: TrainingConfig, path: Path) -> None:
    """Refuse another configuration than the run began with: it would not go on exactly."""
    if not path.is_file():
        return
    then, now = json.loads(path.read_text()), json.loads(config.model_dump_json())
    changed = [key for key in now if key not in ("arguments", *_FREE_TO_CHANGE) and now[key] != then.get(key)]
    before, given = then.get("arguments", {}), now["arguments"]
    changed += [
        key
        for key in sorted(before.keys() | given.keys())
        if before.get(key) != given.get(key) and not _FREE_ARGUMENTS.fullmatch(key)
    ]
    if changed:
        raise TrainingConfigError(
            f"the run in {path.parent} was begun with another {', '.join(changed)}: put it back to go on, or set "
            "overwrite_output_dir true and leave out --resume to begin anew"
        )
