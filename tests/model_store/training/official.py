"""Adapters of our training, and the vectors that the official library gives for them.

`train` runs in the project's environment and writes a tiny MNTP adapter and a SimCSE one on top of it; `vectors` runs
in the official library's (`make golden`) and has it load them as its README says: MNTP, then the second, merged.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "official"
BASE = HERE.parents[2] / "fidelity" / "golden" / "llama" / "base"

# Chooses the template, and is what the adapters say their base is.
NAME = "meta-llama/Meta-Llama-3-8B-Instruct"

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
TEXTS = [
    {"instruction": instruction, "text": text}
    for instruction in ("", INSTRUCTION)
    for text in (
        "how much protein should a female eat",
        "a plane is taking off while a man is playing a flute by the river",
        "  naïve café, 東京 🙂  ",
        "a",
    )
]


def train() -> None:
    """Write official/mntp and official/simcse."""
    from model_store.training.config import parse_config
    from model_store.training.run import train as run
    from tests.model_store.training.runs import write_texts

    shutil.rmtree(HERE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        shutil.copytree(BASE, base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({"_name_or_path": NAME, **config}))
        common: dict[str, Any] = {
            "model_name_or_path": str(base),
            "train_file": str(write_texts(Path(scratch) / "texts.txt")),
            "torch_dtype": "float32",
            "lora_r": 4,
            "learning_rate": 0.02,
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
        }
        mntp = {**common, "output_dir": f"{scratch}/mntp", "line_by_line": True, "mlm_probability": 0.3}
        first = run(parse_config("mntp", mntp))
        simcse = {**common, "output_dir": f"{scratch}/simcse", "peft_model_name_or_path": str(first)}
        second = run(parse_config("simcse", simcse))
        for folder in (first, second):
            files = [path for path in folder.iterdir() if path.is_file() and path.name not in _NOT_OF_THE_ADAPTER]
            (HERE / folder.name).mkdir(parents=True)
            for path in files:
                text = path.read_bytes().replace(str(base).encode(), NAME.encode())
                (HERE / folder.name / path.name).write_bytes(text)


_NOT_OF_THE_ADAPTER = ("trainer_state.json", "training_config.json")


def vectors() -> None:
    """Write official/vectors.safetensors: (texts, width) float32, not normalised, of both and of MNTP alone."""
    from safetensors.torch import save_file

    from tests.fidelity import generate

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        shutil.copytree(BASE, home / "base")
        shutil.copytree(HERE / "mntp", home / "mntp")
        shutil.copytree(HERE / "simcse", home / "simcse")
        with generate._local_mntp(home) as source:
            family = generate.FAMILIES["llama"]
            both = generate.official(family, source, home / "simcse")
            first = generate.official(family, source, None)
        assert both.model.config._name_or_path == NAME
        tensors = {"simcse": generate.vectors(both, TEXTS), "mntp": generate.vectors(first, TEXTS)}
    save_file(tensors, HERE / "vectors.safetensors")
    print({name: tensor.shape for name, tensor in tensors.items()})


if __name__ == "__main__":
    {"train": train, "vectors": vectors}[sys.argv[1]]()
