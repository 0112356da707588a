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
from torch import Tensor

from model_store.training.config import Stage, parse_config
from model_store.training.run import train
from tests.model_store.training.one_step import KeepGradients
from tests.model_store.training.runs import tiny_config

ROOT = Path(__file__).parents[3]


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
    if processes == 1:
        train(parse_config(stage, given), callbacks=[KeepGradients()])
    else:
        path = folder / f"{stage}.json"
        path.write_text(json.dumps(given))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
        command = [sys.executable, *torchrun, "-m", "tests.model_store.training.one_step", stage, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return log[0]["loss"], torch.load(out / "gradients.pt")


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("mntp", {}), ("supervised", {"gradient_cache_chunk_size": 3, "gradient_checkpointing": True})],
)
def test_two_processes_are_one(stage: Stage, changes: dict[str, Any], tmp_path: Path) -> None:
    """In-batch negatives are gathered, hidden tokens counted, over both. Sums in another order are all that differs."""
    (one_loss, one), (two_loss, two) = (first_step(stage, tmp_path, processes, **changes) for processes in (1, 2))
    assert one_loss == pytest.approx(two_loss, rel=1e-5)
    assert one.keys() == two.keys()
    moved = 0
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-4, atol=1e-6)
        moved += bool(gradient.abs().max() > 1e-4)
    assert moved >= 3 * 7  # every B; a new adapter's A has none, as its B is zero
