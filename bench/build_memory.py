"""Memory that a build takes: a random base of a real model's shape, two adapters, merged and self-tested.

    python -m bench.build_memory [--layers 24] [--save]

The base has Sheared-LLaMA-1.3B's shape in bfloat16, or fewer or more layers of it. Anonymous memory is what a machine
must have; the files that are mapped beside it, the kernel takes back when it needs to.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from bench.gpu.inputs import known, random_model, write_base
from bench.report import finish, options_of
from model_store.build.build import build_encoder
from model_store.recipe import recipe_from


def main() -> None:
    """Build and report."""
    options = options_of(__doc__, layers=24)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_from("memory", **write_sources(folder, options.layers))
        seen, merged = [anonymous_bytes()], [0]
        built = threading.Event()

        def watch() -> None:
            while not built.wait(0.02):
                seen.append(anonymous_bytes())

        threading.Thread(target=watch, daemon=True).start()
        began = time.perf_counter()
        manifest = build_encoder(recipe, folder / "encoder", lambda *_: merged.append(max(seen)))
        seconds = round(time.perf_counter() - began)
        built.set()
    result = {
        "parameters": manifest.parameters,
        "weights_gb": round(manifest.parameters * 2 / 1e9, 2),
        "anonymous_gb_before": round(seen[0] / 1e9, 2),
        "anonymous_gb_peak_while_merging": round(merged[-1] / 1e9, 2),
        "anonymous_gb_peak": round(max(seen) / 1e9, 2),
        "seconds": seconds,
    }
    finish("build_memory", result, options.save)


def write_sources(folder: Path, layers: int) -> dict[str, object]:
    """The parts of a recipe: a sharded checkpoint, and two LoRA adapters of two projections a layer."""
    model = random_model(known("princeton-nlp/Sheared-LLaMA-1.3B", num_hidden_layers=layers), torch.device("cpu"))
    base = write_base(model, folder / "base")
    adapters = [str(folder / f"adapter-{number}") for number in (0, 1)]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    for adapter in adapters:
        adapted.save_pretrained(adapter)
    return {"base": base, "adapters": adapters}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
