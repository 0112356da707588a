"""STAGE CONFIG.json: a run that keeps its gradients in output_dir/gradients.pt; by torchrun, or alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback

from model_store.training.config import Stage, parse_config
from model_store.training.run import train


class KeepGradients(TrainerCallback):  # type: ignore[misc]
    """Writes them in the first process, before each update."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the Trainer."""
        if args.process_index == 0:
            named = others["model"].named_parameters()
            gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
            torch.save(gradients, Path(args.output_dir) / "gradients.pt")


if __name__ == "__main__":
    stage, path = sys.argv[1:]
    train(parse_config(cast(Stage, stage), json.loads(Path(path).read_text())), callbacks=[KeepGradients()])
