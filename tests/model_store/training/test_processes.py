"""Two processes with half a batch each are one process with all of it: losses and gradients."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model_store.training.config import Stage, TrainingConfigError, parse_config
from model_store.training.resume import whole_checkpoints
from model_store.training.run import train
from tests.model_store.training.one_step import KeepGradients
from tests.model_store.training.runs import EVERY_LOSS, tiny_config, write_scored

ROOT = Path(__file__).parents[3]


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A module and its arguments, run by so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", "-m"]
    return subprocess.run([sys.executable, *launcher, *command], cwd=ROOT, capture_output=True, text=True)


def first_step(stage: Stage, folder: Path, processes: int, **changes: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step with 8 examples, by so many processes, as the first of them has them."""
    out = folder / f"{stage}-{processes}"
    given = tiny_config(
        stage,
        folder,
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=1,
        lora_dropout=0.0,
        max_grad_norm=0.0,
        max_steps=1,
        output_dir=str(out),
        **changes,
    )
    if "distillation_loss" in changes:
        write_scored(Path(given["train_file"]))
    if processes == 1:
        train(parse_config(stage, given), callbacks=[KeepGradients()])
    else:
        path = folder / f"{stage}.json"
        path.write_text(json.dumps(given))
        done = torchrun(processes, "tests.model_store.training.one_step", stage, str(path))
        assert done.returncode == 0, done.stderr
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return log[0]["loss"], torch.load(out / "gradients.pt")


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("mntp", {}), ("supervised", {**EVERY_LOSS, "gradient_checkpointing": True})],
)
def test_two_processes_are_one(stage: Stage, changes: dict[str, Any], tmp_path: Path) -> None:
    """Negatives are gathered, hidden tokens counted, over both. Sums in another order are all that differs.

    In the supervised stage the processes have different numbers of passages.
    """
    (one_loss, one), (two_loss, two) = (first_step(stage, tmp_path, processes, **changes) for processes in (1, 2))
    assert one_loss == pytest.approx(two_loss, rel=1e-5)
    assert one.keys() == two.keys()
    moved = 0
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-4, atol=1e-6)
        moved += bool(gradient.abs().max() > 1e-4)
    assert moved >= 3 * 7  # every B; a new adapter's A has none, as its B is zero


@pytest.mark.timeout(600)
def test_two_processes_go_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Killed after step 7 of 12, going on from step 6; an epoch has 4. To the last bit, and by as many processes."""
    configs = {}
    for name in ("whole", "killed"):
        given = tiny_config("simcse", tmp_path, output_dir=str(tmp_path / name), save_steps=3)
        configs[name] = tmp_path / f"{name}.json"
        configs[name].write_text(json.dumps(given))
    run = ("tests.model_store.training.runs", "simcse")
    whole = torchrun(2, "service", "train", "simcse", str(configs["whole"]))
    assert whole.returncode == 0, whole.stderr
    assert torchrun(2, *run, str(configs["killed"]), "7").returncode != 0
    (*_, newest) = whole_checkpoints(tmp_path / "killed", processes=2)
    assert newest.name == "checkpoint-6"
    (newest / "rng_state_1.pth").rename(tmp_path / "kept.pth")
    assert whole_checkpoints(tmp_path / "killed", processes=2)[-1].name == "checkpoint-3"
    (tmp_path / "kept.pth").rename(newest / "rng_state_1.pth")

    with pytest.raises(TrainingConfigError, match=r"begun with another number of processes \(2, and now 1\): put it"):
        train(parse_config("simcse", json.loads(configs["killed"].read_text())), resume=True)
    resumed = torchrun(2, "service", "train", "simcse", str(configs["killed"]), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {newest}" in resumed.stdout
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in configs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
