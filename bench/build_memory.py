"""Memory that a build takes: a random base of a real model's shape, two adapters, merged and self-tested.

    python -m bench.build_memory [--layers N] [--save]

The base has Sheared-LLaMA-1.3B's shape in bfloat16, or fewer or more layers of it. Anonymous memory is what a machine
must have; the files that are mapped beside it, the kernel takes back when it needs to.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.gpu.inputs import config_of, known, trained_tokenizer
from bench.report import finish, options_of
from model_store.build.build import build_encoder
from model_store.build.checkpoints import decoder_on_meta
from model_store.recipe import recipe_from

_RANK = 16


def main() -> None:
    """Build and report."""
    parser = options_of(__doc__)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = write_base(folder / "base", options.layers)
        adapters = [write_adapter(folder / f"adapter-{number}", options.layers) for number in (0, 1)]
        recipe = recipe_from("memory", base=base, adapters=adapters)
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


def write_base(folder: Path, layers: int) -> str:
    """Its path: a sharded bfloat16 checkpoint of random weights."""
    folder.mkdir()
    config = config_of(known("princeton-nlp/Sheared-LLaMA-1.3B"), layers)
    config.save_pretrained(folder)
    trained_tokenizer().save(str(folder / "tokenizer.json"))
    weight_map = {}
    for name, tensor in decoder_on_meta(config).state_dict().items():
        values = torch.randn(tensor.shape) * 0.02 if tensor.dim() > 1 else torch.ones(tensor.shape)
        file = f"{name}.safetensors"
        save_file({f"model.{name}": values.bfloat16()}, folder / file)
        weight_map[f"model.{name}"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)


def write_adapter(folder: Path, layers: int) -> str:
    """Its path: a LoRA adapter of two projections a layer."""
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in {"self_attn.q_proj": (2048, 2048), "mlp.down_proj": (2048, 5504)}.items():
            prefix = f"base_model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(_RANK, columns) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, _RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
