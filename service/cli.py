"""The one command, `llm2vec-service`. Each subcommand is a few lines over the package that does the work."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from model_store.build.progress import bar_class
from model_store.build.sources import shape_of
from model_store.json_text import read_json_object
from model_store.manifest import CONFIG_FILE, find_built
from model_store.pooling_modes import PoolingMode
from model_store.recipe import DType, RecipeError, load_recipe, packaged_recipes, recipe_from
from service.bulk.asked import FileFormat, OnError
from service.bulk.reading import Kind
from service.embedding.choices import EmbedDtype, Overflow
from service.logs import unexplained
from service.planning.gpus import gpu_named, gpus
from service.planning.plan import QUERY_TOKENS, Plan, memory_needed
from service.planning.report import as_json, as_table, asked_of
from service.settings import BATCH_SECONDS, KEY_VARIABLE, PREFIX, SECRETS, TOKEN_BUDGET, Settings, load_settings

# eos_token is last_token with another template, which is fixed when an encoder is built.
_EVALUATED_POOLINGS = tuple(mode for mode in get_args(PoolingMode) if mode != "eos_token")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status. An error that the user can correct is one sentence on stderr."""
    # The server tokenizes in its own threads; the tokenizer's threads would compete with them for the same cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if unexplained(error):
            raise
        print(f"llm2vec-service: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llm2vec-service", description="LLM2Vec text embeddings: build, verify, serve.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve an encoder over HTTP",
        allow_abbrev=False,  # otherwise --api-keys would mean --api-keys-file
        description=f"Every option is also a variable: {PREFIX}PORT and so on. Keys are variables only.",
    )
    options = {name: field for name, field in Settings.model_fields.items() if name not in SECRETS}
    for name, field in options.items():
        default = "" if field.default in (None, "", ()) else f" (default {field.default})"
        flag = f"--{name.replace('_', '-')}"
        serve.add_argument(flag, metavar="VALUE", help=f"{field.description}{default}".replace("%", "%%"))
    serve.set_defaults(run=_serve)

    build = commands.add_parser("build", help="make a stored encoder from a base and its adapters")
    build.add_argument("--recipe", metavar="NAME|FILE.toml", help="a packaged recipe, or one of your own")
    build.add_argument(
        "--base", metavar="REF", help="a folder, a hub id org/name[@revision], or demo:; overrides a recipe's"
    )
    build.add_argument("--adapter", metavar="REF", action="append", help="a LoRA adapter; several are merged in order")
    build.add_argument("--out", metavar="DIR", type=Path, help="the encoder's folder")
    build.add_argument("--dtype", choices=get_args(DType))
    build.add_argument("--pooling", choices=get_args(PoolingMode))
    build.add_argument("--max-length", type=int, metavar="N", help="reference truncation: tokens of a row")
    build.add_argument("--doc-max-length", type=int, metavar="N", help="reference truncation: tokens of a text")
    build.add_argument("--no-skip-instruction", action="store_true", help="pool the instruction's tokens too")
    build.add_argument("--list", action="store_true", help="list the packaged recipes")
    build.set_defaults(run=_build)

    verify = commands.add_parser("verify", help="check a stored encoder's files, tensors and vectors")
    verify.add_argument("folder", type=Path)
    verify.set_defaults(run=_verify)

    show = commands.add_parser("show", help="print what a stored encoder is")
    show.add_argument("folder", type=Path)
    show.set_defaults(run=_show)

    _add_embed(commands)
    _add_plan(commands)
    _add_eval(commands)
    _add_train(commands)
    return parser


def _add_embed(commands: Any) -> None:
    embed = commands.add_parser(
        "embed",
        help="embed files of texts into a folder of vectors",
        allow_abbrev=False,
        description="A job that was cut off goes on when the same command is given again. Settings of `serve` that "
        f"have no option here are taken from their variables. A server's key is taken from {KEY_VARIABLE}.",
    )
    embed.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help=".jsonl, .csv, .tsv or .txt (one text on each line), each also as .gz, or .parquet; or a folder of such "
        "files, or of .txt files with one text each",
    )
    embed.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    embed.add_argument("--url", help="a running server, such as http://127.0.0.1:8000, instead of an encoder here")
    embed.add_argument("--model", metavar="DIR|RECIPE", help="a stored encoder, or a recipe, which is built if needed")
    embed.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    embed.add_argument("--dtype", choices=("auto", *get_args(DType)), help="arithmetic, as in `serve`")
    embed.add_argument("--input-format", choices=get_args(Kind), help="format of inputs whose names don't show it")
    embed.add_argument("--text-column", default="text", metavar="COLUMN", help="(default %(default)s)")
    embed.add_argument(
        "--id-column", metavar="COLUMN", help="stored as `id`; for files with one text each it is the path"
    )
    embed.add_argument(
        "--carry",
        metavar="COLUMN",
        action="append",
        default=[],
        help="a column to store as it is; repeat it for each column",
    )
    embed.add_argument("--instruction", default="", help="put before each text, but not pooled")
    embed.add_argument("--dimensions", type=int, metavar="N", help="cut vectors to N numbers, and normalise them again")
    embed.add_argument(
        "--overflow", choices=get_args(Overflow), default="error", help="what to do with a text that is too long"
    )
    embed.add_argument(
        "--embed-dtype", choices=get_args(EmbedDtype), default="float32", help="number format of the stored vectors"
    )
    embed.add_argument("--format", choices=get_args(FileFormat), default="parquet", help="(default %(default)s)")
    embed.add_argument("--rows-per-shard", type=int, default=10_000, metavar="N", help="(default %(default)s)")
    embed.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="stop",
        help="stop at a row that can't be embedded, or leave it out and list it in errors.jsonl",
    )
    embed.add_argument("--overwrite", action="store_true", help="begin anew, even if another job wrote the folder")
    embed.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at once to --url (default %(default)s)"
    )
    embed.set_defaults(run=_embed)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what speed, memory and number of GPUs to expect",
        allow_abbrev=False,
        description="From the model's arithmetic and the GPU's data sheet. Durations: 50ms, 90s, 30m, 24h, 7d.",
    )
    plan.add_argument("--model", required=True, metavar="DIR|RECIPE|HUB ID", help="an encoder, a recipe, or a base")
    plan.add_argument(
        "--gpu",
        required=True,
        metavar="NAME",
        nargs="+",
        help=f"{', '.join(gpus())}; several are compared side by side",
    )
    plan.add_argument("--quantization", choices=("none", "fp8"), default="none")
    plan.add_argument("--token-budget", type=int, metavar="N", default=TOKEN_BUDGET["cuda"], help="as in `serve`")
    plan.add_argument(
        "--batch-seconds", type=float, metavar="SECONDS", default=BATCH_SECONDS["cuda"], help="as in `serve`"
    )
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument(
        "--efficiency", type=float, metavar="SHARE", help="share of the GPU's peak, instead of the assumed one"
    )
    speed.add_argument(
        "--timed",
        type=float,
        nargs=2,
        metavar=("TOKENS_PER_SECOND", "SMALLEST_BATCH_MS"),
        help="the figures that a server logged as `calibrated` on such a GPU",
    )
    plan.add_argument("--texts", type=int, metavar="N", help="texts of a bulk job")
    plan.add_argument("--tokens-per-text", type=int, metavar="N", help="tokens of each text")
    plan.add_argument(
        "--within", metavar="DURATION", default="24h", help="time that the bulk job may take (default 24h)"
    )
    plan.add_argument("--queries-per-second", type=float, metavar="N", help="queries a second to serve")
    plan.add_argument(
        "--query-tokens", type=int, metavar="N", default=QUERY_TOKENS, help="tokens of each query (default 28)"
    )
    plan.add_argument(
        "--p99", metavar="DURATION", default="100ms", help="time to answer 99 %% of queries (default 100ms)"
    )
    plan.add_argument("--dimensions", type=int, metavar="N", help="width of the stored vectors; by default the model's")
    plan.add_argument("--price", type=float, metavar="PRICE", help="price of a GPU-hour")
    plan.add_argument("--json", action="store_true", help="print the figures as JSON")
    plan.set_defaults(run=_plan)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure vectors: similarity, retrieval, probes, MTEB",
        allow_abbrev=False,
        description="Scores of a server, an encoder, or each stage of making one. Data files may be .gz.",
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--url", help="a running server, such as http://127.0.0.1:8000")
    what.add_argument("--model", metavar="DIR|RECIPE", help="a stored encoder, or a recipe, which is built if needed")
    what.add_argument(
        "--stages",
        metavar="RECIPE",
        help="a recipe's base: causal, bidirectional, then with one more adapter each time",
    )
    several = partial(evaluate.add_argument, action="append", default=[])
    several("--adapter", metavar="REF", help="with --stages: these adapters, in this order, instead of the recipe's")
    several("--sts", metavar="FILE", type=Path, help="TSV or JSON lines with score, sentence1 and sentence2")
    probe = partial(several, nargs=2, type=Path, metavar=("TRAIN", "TEST"))
    probe("--words", help="word-level probes: CoNLL columns (CoNLL-2000, CoNLL-2003, CoNLL-U, or word and tag)")
    probe("--classification", help="a probe of text vectors: TSV or JSON lines with text and label")
    several("--retrieval", metavar="DIR", type=Path, help="corpus.jsonl, queries.jsonl and qrels/test.tsv, as in BEIR")
    several("--mteb", metavar="TASK", help="a task of MTEB by its name; needs the extra eval")
    evaluate.add_argument("--instruction", default="", help="put before sentences of --sts and --classification")
    evaluate.add_argument("--query-instruction", default="", help="put before queries of --retrieval")
    evaluate.add_argument("--mteb-instructions", metavar="FILE.json", type=Path, help="{task: instruction} for --mteb")
    evaluate.add_argument(
        "--probe-limit", type=int, metavar="N", help="fit probes to N of TRAIN, drawn at random but the same each time"
    )
    several("--pooling", choices=_EVALUATED_POOLINGS, help="instead of the encoder's own; several are compared")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    evaluate.add_argument("--dtype", choices=("auto", *get_args(DType)), default="auto")
    evaluate.add_argument("--json", metavar="FILE", type=Path, help="write the scores to this file")
    evaluate.add_argument(
        "--picture", metavar="FILE", type=Path, help="draw the scores to this file: .png, .svg or .pdf"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train an adapter that makes a decoder an encoder")
    train.add_argument("stage", choices=("mntp", "simcse", "supervised"))
    train.add_argument("config", type=Path, metavar="CONFIG.json", help="as the official LLM2Vec scripts read it")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in its output_dir")
    train.set_defaults(run=_train)


def _serve(options: argparse.Namespace) -> int:
    asked = vars(options)
    given = {name: value for name in Settings.model_fields if (value := asked.get(name)) is not None}
    settings = load_settings(given)

    if settings.several_processes:
        from service.processes.supervisor import supervise

        return supervise(settings, _ProgressBar("building"))

    from service.server.process import serve

    return serve(settings, _ProgressBar("building"))


def _build(options: argparse.Namespace) -> int:
    if options.list:
        print(f"{'recipe':30} {'weights':>8} {'GPU':>9}  what it is")
        for name, recipe in packaged_recipes().items():
            memory = memory_needed(shape_of(recipe.base), "bfloat16", TOKEN_BUDGET["cuda"])
            size = f"{memory['weights'] / 1e9:5.1f} GB {sum(memory.values()) / 1e9:6.1f} GB"
            print(f"{name:30} {size}  {recipe.description}{' (gated)' if recipe.gated else ''}")
        return 0
    parts: dict[str, Any] = {
        "base": options.base,
        "adapters": options.adapter,
        "dtype": options.dtype,
        "pooling": options.pooling,
        "max_length": options.max_length,
        "doc_max_length": options.doc_max_length,
        "skip_instruction": False if options.no_skip_instruction else None,
    }
    if options.recipe:
        base = parts.pop("base")
        asked_twice = [name for name, value in parts.items() if value is not None]
        if asked_twice:
            raise RecipeError(f"--recipe says it all: leave out {', '.join(asked_twice)}, or write a recipe file")
        recipe = load_recipe(options.recipe)
        if base and not options.out:
            raise RecipeError(
                "--base with --recipe needs --out DIR: the recipe's own place is for the recipe's own base"
            )
        if base:  # a copy of a gated base, or one on this disk
            recipe = recipe.model_copy(update={"base": base})
    elif options.base and options.out:
        recipe = recipe_from(options.out.name, **parts)
    else:
        raise RecipeError("build needs --recipe NAME, or --base REF and --out DIR")

    folder = options.out or load_settings({}).models_dir.expanduser() / recipe.name
    if find_built(folder, recipe):
        print(f"{folder} has it already, whole and unchanged")
        return 0

    from model_store.build.build import build_encoder

    manifest = build_encoder(recipe, folder, _ProgressBar("building"))
    print(f"{folder}: {manifest.name}, {manifest.parameters / 1e6:.0f}M parameters, {manifest.width} dimensions")
    return 0


def _plan(options: argparse.Namespace) -> int:
    given = Path(options.model).expanduser()
    hub_id = "/" in options.model and not options.model.endswith(".toml")
    reference = options.model if given.is_dir() or hub_id else load_recipe(options.model).base
    asked = asked_of(vars(options))
    plans = [Plan(shape_of(reference), gpu_named(name), asked) for name in options.gpu]
    print(json.dumps(as_json(options.model, plans)) if options.json else as_table(options.model, plans))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from model_store.build.verify import verify_encoder

    checks = verify_encoder(options.folder)
    for check in checks:
        print(f"{'FAILED' if check.problems else 'ok':7}{check.name}: {check.found}")
        for problem in check.problems:
            print(f"       - {problem}")
    return int(any(check.problems for check in checks))


def _read_limit(folder: Path) -> str:
    from model_store.rope import limited_by

    kind = limited_by(read_json_object(folder / CONFIG_FILE))
    return f" (its base reads more: beyond them {kind} RoPE would depend on batch mates)" if kind else ""


def _show(options: argparse.Namespace) -> int:
    from model_store.manifest import read_manifest

    manifest = read_manifest(options.folder)
    lines: dict[str, Any] = {
        "name": manifest.name,
        "model": f"{manifest.model_type}, {manifest.parameters / 1e6:.0f}M parameters, {manifest.dtype}",
        "base": _source(manifest.base.reference, manifest.base.commit),
        "adapters": ", ".join(_source(item.reference, item.commit) for item in manifest.adapters) or "none",
        "tokenizer": manifest.tokenizer,
        "dimensions": manifest.width,
        "reads": f"{manifest.max_positions} tokens" + _read_limit(options.folder),
        "pooling": f"{manifest.pooling}, instruction {'left out' if manifest.skip_instruction else 'included'}",
        "template": f"{manifest.template.prefix!r} + text + {manifest.template.suffix!r}"
        + (" (stripped)" if manifest.template.strip else ""),
        "limits": f"{manifest.max_length} tokens, text {manifest.doc_max_length} (reference truncation)",
        "query instruction": manifest.query_instruction or "none",
        "embedding space": manifest.embedding_space,
        "size": f"{sum(file.size for file in manifest.files.values()) / 1e9:.2f} GB in {len(manifest.files)} files",
        "built with": ", ".join(f"{name} {found}" for name, found in manifest.tools.items()),
    }
    for name, value in lines.items():
        print(f"{name:18} {value}")
    return 0


def _embed(options: argparse.Namespace) -> int:
    from service.bulk.asked import Asked
    from service.bulk.command import embed

    embed(Asked(**{field.name: getattr(options, field.name) for field in fields(Asked)}), _ProgressBar("building"))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from model_store.evaluation.command import Asked, evaluate
    from service.bulk.client import embed_texts

    asked = Asked(**{field.name: getattr(options, field.name) for field in fields(Asked)})
    embed = partial(embed_texts, options.url or "")
    evaluate(asked, embed, load_settings({}).models_dir.expanduser(), _ProgressBar("building"))
    return 0


def _train(options: argparse.Namespace) -> int:
    from model_store.training.config import read_config
    from model_store.training.run import train

    print(train(read_config(options.stage, options.config), options.resume))
    return 0


def _source(reference: str, commit: str | None) -> str:
    return f"{reference} ({commit})" if commit else reference


class _ProgressBar:
    """Shows the bytes of weights written."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = bar_class()(total=total, desc=self._what, unit="B", unit_scale=True)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None


if __name__ == "__main__":
    sys.exit(main())
