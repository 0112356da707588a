"""A decoder made an encoder of one's own, on one GPU, by one command: MNTP, then SimCSE, then a stored encoder.

    python examples/train_encoder.py --base princeton-nlp/Sheared-LLaMA-1.3B --texts paragraphs.txt --out my-encoder

Writes the two configurations into my-encoder/, runs `llm2vec-service train` with each and `llm2vec-service build` with
what they leave: serve my-encoder/encoder. Cut off, it goes on where it was. With --triplets the second stage is
supervised. Settings are those published with LLM2Vec, in memory for 7B on 24 GB: change the configurations to taste.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Train, train, build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a hub id or a folder: a decoder of a supported family")
    parser.add_argument("--texts", type=Path, required=True, help="paragraphs, one a line (.txt, .jsonl; .gz)")
    parser.add_argument("--sentences", type=Path, help="for SimCSE, one a line (default: --texts)")
    parser.add_argument("--triplets", type=Path, help="query, positive and negative in .jsonl: supervised, not SimCSE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=1000, help="of each stage (default %(default)s)")
    parser.add_argument("--sts", type=Path, help="pairs with scores: the checkpoint that ranks them best is kept")
    options = parser.parse_args()
    first, second, encoder = (options.out / name for name in ("mntp", "second", "encoder"))
    stage = "supervised" if options.triplets else "simcse"
    run("train", "mntp", configuration(options.out / "mntp.json", mntp(options, first)), "--resume")
    run("train", stage, configuration(options.out / f"{stage}.json", contrastive(options, first, second)), "--resume")
    if not (encoder / "manifest.json").is_file():
        adapters = ["--adapter", str(first), "--adapter", str(second)]
        run("build", "--base", options.base, *adapters, "--out", str(encoder))
    print(f"llm2vec-service serve --model {encoder}")


def mntp(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """As published for Llama models, but for smaller batches, accumulated."""
    return {
        "model_name_or_path": options.base,
        "train_file": str(options.texts),
        "output_dir": str(out),
        "mask_token_type": "blank",
        "data_collator_type": "default",
        "mlm_probability": 0.2,
        "max_seq_length": 512,
        "lora_r": 16,
        "torch_dtype": "bfloat16",
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-5,
        "max_steps": options.steps,
        "logging_steps": 10,
        "save_steps": 200,
        "eval_strategy": "steps",
        "eval_steps": 200,
        "max_eval_samples": 500,
    }


def contrastive(options: argparse.Namespace, before: Path, out: Path) -> dict[str, Any]:
    """As published, but for gradient caching: 32 texts in memory at a time."""
    supervised = options.triplets is not None
    config: dict[str, Any] = {
        "model_name_or_path": options.base,
        "peft_model_name_or_path": str(before),
        "train_file": str(options.triplets or options.sentences or options.texts),
        "output_dir": str(out),
        "pooling_mode": "mean",
        "max_seq_length": 512 if supervised else 128,
        "lora_r": 16,
        "torch_dtype": "bfloat16",
        "gradient_checkpointing": True,
        "gradient_cache_chunk_size": 32,
        "per_device_train_batch_size": 64 if supervised else 128,
        "learning_rate": 2e-4 if supervised else 3e-5,
        "loss_scale": 50 if supervised else 20,
        "max_steps": options.steps,
        "logging_steps": 10,
        "save_steps": 200,
    }
    config |= {"warmup_steps": 300} if supervised else {"simcse_dropout": 0.3}
    if options.sts:
        config |= {
            "eval_sts_file": str(options.sts),
            "eval_strategy": "steps",
            "eval_steps": 200,
            "load_best_model_at_end": True,
            "metric_for_best_model": "spearman",
            "greater_is_better": True,
        }
    return config


def configuration(path: Path, content: dict[str, Any]) -> str:
    """Written unless it is there: what was changed by hand stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_text(json.dumps(content, indent=2) + "\n")
    return str(path)


def run(*arguments: str) -> None:
    """One subcommand of `llm2vec-service`; the script ends where it fails."""
    print("llm2vec-service", *arguments, flush=True)
    status = subprocess.run([sys.executable, "-m", "service", *arguments]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
