"""Embed files of texts on a Ray cluster: an encoder on each GPU, or on some cores, and vectors into parquet.

    python examples/ray_data_embed.py corpus/*.parquet --out s3://bucket/vectors --model my-encoder --actors 8 --gpus 1

INPUT and --out are files or folders that every machine of the cluster can reach, as is the model (a recipe is built
once on each). Without a cluster, Ray starts on this machine. For one machine `llm2vec-service embed` does the same job
and can go on with it after a kill; this one begins anew.
"""

from __future__ import annotations

import argparse

import ray

from service.ray.ray_data import EmbedBatches


def main() -> None:
    """Read, embed, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=".parquet, .jsonl or .csv")
    parser.add_argument("--input-format", choices=("parquet", "jsonl", "csv"), help="where names do not say it")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--model", default="demo", metavar="DIR|RECIPE")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--instruction", default="")
    parser.add_argument("--dimensions", type=int)
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop")
    parser.add_argument("--actors", type=int, default=1, help="encoders, each in a process of its own")
    parser.add_argument("--gpus", type=float, default=0, help="of each encoder")
    parser.add_argument("--cpus", type=float, default=1, help="of each encoder")
    parser.add_argument("--rows-at-once", type=int, default=2048, help="enough to fill several batches of the device")
    options = parser.parse_args()

    readers = {"parquet": ray.data.read_parquet, "jsonl": ray.data.read_json, "csv": ray.data.read_csv}
    kind = options.input_format or options.inputs[0].rpartition(".")[2]
    if kind not in readers:
        parser.error(f"{options.inputs[0]}: its name does not say what it is: give --input-format")

    ray.init(ignore_reinit_error=True)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    vectors = readers[kind](options.inputs).map_batches(
        EmbedBatches,
        fn_constructor_kwargs={
            "model": options.model,
            "text_column": options.text_column,
            "instruction": options.instruction,
            "dimensions": options.dimensions,
            "on_error": options.on_error,
        },
        batch_format="pyarrow",
        batch_size=options.rows_at_once,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=options.gpus,
        num_cpus=options.cpus,
    )
    vectors.write_parquet(options.out)


if __name__ == "__main__":
    main()
