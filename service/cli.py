"""The one command, `llm2vec-service`. Each subcommand is a few lines over the package that does the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from typer.main import get_command

from model_store.build.progress import ProgressBar
from model_store.json_text import read_json_object
from model_store.manifest import CONFIG_FILE, find_built, read_manifest
from model_store.pooling_modes import PoolingMode
from model_store.recipe import DType, Recipe, RecipeError, load_recipe, packaged_recipes, recipe_from
from model_store.rope import limited_by
from model_store.shape import WEIGHT_BYTES, known_configs
from service.bulk.job import Asked, FileFormat, OnError
from service.bulk.reading import Kind
from service.embedding.choices import EmbedDtype, Overflow
from service.logs import unexplained
from service.options import (
    ARITHMETIC,
    DEVICE,
    ENCODER,
    SERVER,
    Arithmetic,
    SeveralValues,
    argument,
    at_most_one,
    given_settings,
    offered,
    option,
    pairs,
    signature_of_settings,
)
from service.planning.gpus import gpu_named, gpus
from service.planning.plan import QUERY_TOKENS, Plan, memory_needed
from service.planning.report import as_json, as_table, asked_of
from service.settings import BATCH_SECONDS, TOKEN_BUDGET, load_settings
from service.training_commands import training_commands

_NAME = "llm2vec-service"

# eos_token is last_token with another template, which is fixed when an encoder is built.
_POOLINGS = tuple(mode for mode in get_args(PoolingMode) if mode != "eos_token")

_Texts = list[str] | None
_Paths = list[Path] | None
_Poolings = Annotated[
    list[str] | None,
    option(
        "pooling instead of the encoder's own; several are compared",
        f"<{'|'.join(_POOLINGS)}>",
        autocompletion=offered(_POOLINGS),
    ),
]

_commands = typer.Typer(
    help="LLM2Vec text embeddings: build, verify, serve.", context_settings={"help_option_names": ["-h", "--help"]}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status. An error that the user can correct is one sentence on stderr.

    Raises:
        SystemExit: with status 2 for arguments that can't be read, after one sentence on stderr.
    """
    # The server tokenizes in its own threads; the tokenizer's threads would compete with them for the same cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("NO_COLOR"):  # rich alone would still print bold and dim text
        os.environ.setdefault("TTY_COMPATIBLE", "0")
    try:
        return int(get_command(_commands).main(arguments, _NAME, standalone_mode=False))
    except typer.TyperException as error:
        print(f"{_NAME}: {' '.join(error.format_message().replace('Value error, ', '').split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if unexplained(error):
            raise
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 1


@_commands.command()
def serve(context: typer.Context, **_: str | None) -> int:
    """Serve an encoder over HTTP.

    Every option is also a variable: LLM2VEC_PORT and so on. Keys are variables only.
    """
    settings = load_settings(given_settings(context))

    if settings.several_processes:
        from service.processes.supervisor import supervise

        return supervise(settings, ProgressBar())

    from service.server.process import serve

    return serve(settings, ProgressBar())


serve.__signature__ = signature_of_settings()  # type: ignore[attr-defined]


@_commands.command()
def build(
    recipe: Annotated[str | None, option("a packaged recipe, or one of your own", "NAME|FILE.toml")] = None,
    base: Annotated[
        str | None, option("a folder, a hub id (org/name or org/name@revision), or demo:; overrides a recipe's", "REF")
    ] = None,
    adapter: Annotated[_Texts, option("a LoRA adapter; several are merged in order", "REF")] = None,
    out: Annotated[Path | None, option("the encoder's folder", "DIR")] = None,
    dtype: Annotated[DType | None, option("the numbers that the weights are stored as")] = None,
    pooling: Annotated[PoolingMode | None, option("how token vectors become one text vector")] = None,
    max_length: Annotated[int | None, option("reference truncation: most tokens of a row")] = None,
    doc_max_length: Annotated[int | None, option("reference truncation: most tokens of a text")] = None,
    no_skip_instruction: Annotated[
        bool, option("pool the instruction's tokens too", name="--no-skip-instruction")
    ] = False,
    listed: Annotated[bool, option("list the packaged recipes", name="--list")] = False,
) -> int:
    """Make a stored encoder from a base and its adapters."""
    if listed:
        _list_recipes()
        return 0
    parts: dict[str, Any] = {
        "base": base,
        "adapters": adapter,
        "dtype": dtype,
        "pooling": pooling,
        "max_length": max_length,
        "doc_max_length": doc_max_length,
        "skip_instruction": False if no_skip_instruction else None,
    }
    encoder = _asked_recipe(recipe, out, parts)
    folder = out or load_settings({}).models_dir.expanduser() / encoder.name
    if find_built(folder, encoder):
        print(f"{folder} has it already, whole and unchanged")
        return 0

    from model_store.build.build import build_encoder

    manifest = build_encoder(encoder, folder, ProgressBar())
    print(f"{folder}: {manifest.name}, {manifest.parameters / 1e6:.0f}M parameters, {manifest.width} dimensions")
    return 0


def _asked_recipe(name: str | None, out: Path | None, parts: dict[str, Any]) -> Recipe:
    """What `build` is asked to make: a recipe by its name, or one of parts."""
    if not name:
        if not (parts["base"] and out):
            raise RecipeError("build needs --recipe NAME, or --base REF and --out DIR")
        return recipe_from(out.name, **parts)
    base = parts.pop("base")
    asked_twice = [part for part, value in parts.items() if value is not None]
    if asked_twice:
        raise RecipeError(f"--recipe says it all: leave out {', '.join(asked_twice)}, or write a recipe file")
    recipe = load_recipe(name)
    if base and not out:
        raise RecipeError("--base with --recipe needs --out DIR: the recipe's own place is for the recipe's own base")
    # The base may be a copy of a gated one, or a folder on this disk.
    return recipe.model_copy(update={"base": base}) if base else recipe


def _list_recipes() -> None:
    recipes = packaged_recipes()
    wide = max(map(len, recipes))
    print(f"{'recipe':{wide}} {'weights':>8} {'GPU':>9}  what it is")
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes.values():
        groups.setdefault(recipe.evidence, []).append(recipe)
    for evidence, group in groups.items():
        print(f"\n{evidence}")
        for recipe in group:
            print(f"{recipe.name:{wide}} {_memory(recipe)}  {recipe.description}{' (gated)' if recipe.gated else ''}")


def _memory(recipe: Recipe) -> str:
    """The memory of the weights and of a GPU; without a known shape there is only the number of the parameters."""
    from model_store.build.sources import shape_of

    if recipe.base not in known_configs():
        return f"{WEIGHT_BYTES['bfloat16'] * (recipe.parameters or 0) / 1e9:5.1f} GB {'?':>6}   "
    memory = memory_needed(shape_of(recipe.base), "bfloat16", TOKEN_BUDGET["cuda"])
    return f"{memory['weights'] / 1e9:5.1f} GB {sum(memory.values()) / 1e9:6.1f} GB"


@_commands.command()
def verify(folder: Annotated[Path, argument("the encoder's folder")]) -> int:
    """Check a stored encoder's files, tensors and vectors."""
    from model_store.build.verify import verify_encoder

    checks = verify_encoder(folder)
    for check in checks:
        print(f"{'FAILED' if check.problems else 'ok':7}{check.name}: {check.found}")
        for problem in check.problems:
            print(f"       - {problem}")
    return int(any(check.problems for check in checks))


@_commands.command()
def export(
    folder: Annotated[Path, argument("the encoder's folder")],
    out: Annotated[Path, option("where to write it", "DIR")],
) -> int:
    """Write a stored encoder as sentence-transformers' own modules, where they can be it."""
    from model_store.build.export import export_encoder

    export_encoder(folder, out)
    print(f"{out}: opens with SentenceTransformer({str(out)!r}), without this package")
    return 0


@_commands.command()
def show(folder: Annotated[Path, argument("the encoder's folder")]) -> int:
    """Print what a stored encoder is."""
    manifest = read_manifest(folder)
    template = manifest.template
    two_forms = bool(template.bare_lead or template.trail)
    lines: dict[str, Any] = {
        "name": manifest.name,
        "model": f"{manifest.model_type}, {manifest.parameters / 1e6:.0f}M parameters, {manifest.dtype}",
        "base": _source(manifest.base.reference, manifest.base.commit),
        "adapters": ", ".join(_source(item.reference, item.commit) for item in manifest.adapters) or "none",
        "tokenizer": manifest.tokenizer,
        "dimensions": manifest.width,
        "may be cut to": ", ".join(map(str, manifest.widths)) or "not known",
        "reads": f"{manifest.max_positions} tokens" + _read_limit(folder),
        "pooling": f"{manifest.pooling}, instruction {'left out' if manifest.skip_instruction else 'included'}"
        + (", counted by its own tokens" if manifest.span_count == "prompt" else ""),
        "attention": manifest.attention,
        "template": f"{template.prefix!r} + {template.lead!r} + text + {template.after_text('x')!r}"
        + (" (stripped)" if template.strip else "")
        + (f"; {template.bare_lead!r} + text + {template.suffix!r} without an instruction" if two_forms else ""),
        "limits": f"{manifest.max_length} tokens, text {manifest.doc_max_length} (reference truncation)",
        "query instruction": manifest.query_instruction or "none",
        "of documents": manifest.document_instruction or "none",
        "embedding space": manifest.embedding_space,
        "size": f"{sum(file.size for file in manifest.files.values()) / 1e9:.2f} GB in {len(manifest.files)} files",
        "built with": ", ".join(f"{name} {found}" for name, found in manifest.tools.items()),
    }
    for name, value in lines.items():
        print(f"{name:18} {value}")
    return 0


@_commands.command()
def embed(
    inputs: Annotated[
        list[Path],
        argument(
            ".jsonl, .csv, .tsv or .txt (one text on each line), each also as .gz, or .parquet; or a folder of such "
            "files, or of .txt files with one text each",
            "INPUT",
        ),
    ],
    out: Annotated[Path, option("the folder to write", "DIR")],
    url: Annotated[str | None, option(f"{SERVER}, instead of an encoder here")] = None,
    model: Annotated[str | None, option(ENCODER, "DIR|RECIPE")] = None,
    device: Annotated[str | None, option(DEVICE)] = None,
    dtype: Annotated[Arithmetic | None, option(ARITHMETIC)] = None,
    input_format: Annotated[Kind | None, option("format of inputs whose names don't show it")] = None,
    text_column: Annotated[str, option("the column of the texts", "COLUMN")] = "text",
    id_column: Annotated[
        str | None, option("stored as `id`; for files with one text each it is the path", "COLUMN")
    ] = None,
    carry: Annotated[_Texts, option("a column to store as it is; repeat it for each column", "COLUMN")] = None,
    instruction: Annotated[
        str | None, option("instruction put before each text, instead of the encoder's default prompt; '' for none")
    ] = None,
    input_type: Annotated[
        str | None, option("query, document or a prompt's name: its instruction is put before each text", "NAME")
    ] = None,
    dimensions: Annotated[int | None, option("cut vectors to this many dimensions, and normalise them again")] = None,
    overflow: Annotated[Overflow, option("what to do with a text that is too long")] = "error",
    embed_dtype: Annotated[EmbedDtype, option("number format of the stored vectors")] = "float32",
    format: Annotated[FileFormat, option("format of the files written")] = "parquet",  # noqa: A002
    rows_per_shard: Annotated[int, option("rows in one file")] = 10_000,
    on_error: Annotated[
        OnError, option("stop at a row that can't be embedded, or leave it out and list it in errors.jsonl")
    ] = "stop",
    overwrite: Annotated[bool, option("begin anew, even if another job wrote the folder", name="--overwrite")] = False,
    concurrency: Annotated[int, option("requests sent to --url at the same time")] = 16,
) -> int:
    """Embed files of texts into a folder of vectors.

    A job that was cut off goes on when the same command is given again.
    Settings of `serve` that have no option here are taken from their variables.
    A server's key is taken from EMBED_API_KEY.
    """
    asked = Asked(**_given(locals()))

    from service.bulk.command import embed

    embed(asked, ProgressBar())
    return 0


@_commands.command(cls=SeveralValues)
def plan(
    context: typer.Context,
    model: Annotated[str, option("an encoder, a recipe, or a base", "DIR|RECIPE|HUB ID")],
    gpu: Annotated[list[str], option(f"{', '.join(gpus())}; several are compared side by side", "NAME...")],
    quantization: Annotated[Literal["none", "fp8"], option("as in `serve`")] = "none",
    token_budget: Annotated[int, option("as in `serve`")] = TOKEN_BUDGET["cuda"],
    batch_seconds: Annotated[float, option("as in `serve`")] = BATCH_SECONDS["cuda"],
    efficiency: Annotated[
        float | None, option("share of the GPU's peak, instead of the assumed one; not with --timed")
    ] = None,
    timed: Annotated[
        tuple[float, float] | None,
        option("the figures that a server logged as `calibrated` on such a GPU", "TOKENS_PER_SECOND SMALLEST_BATCH_MS"),
    ] = None,
    texts: Annotated[int | None, option("bulk job: number of texts")] = None,
    tokens_per_text: Annotated[int | None, option("bulk job: tokens of each text")] = None,
    within: Annotated[str, option("bulk job: time that it may take", "DURATION")] = "24h",
    queries_per_second: Annotated[float | None, option("serving load: queries a second")] = None,
    query_tokens: Annotated[int, option("serving load: tokens of each query")] = QUERY_TOKENS,
    p99: Annotated[str, option("serving load: time in which 99 % of the queries are answered", "DURATION")] = "100ms",
    dimensions: Annotated[int | None, option("width of the stored vectors; by default the model's")] = None,
    price: Annotated[float | None, option("price of a GPU-hour")] = None,
    json: Annotated[bool, option("print the figures as JSON", name="--json")] = False,
) -> int:
    """What speed, memory and number of GPUs to expect.

    From the model's arithmetic and the GPU's data sheet.
    Durations: 50ms, 90s, 30m, 24h, 7d.
    """
    at_most_one(efficiency=efficiency, timed=timed)
    hub_id = "/" in model and not model.endswith(".toml")
    reference = model if Path(model).expanduser().is_dir() or hub_id else load_recipe(model).base

    from model_store.build.sources import shape_of

    asked = asked_of(context.params)
    plans = [Plan(shape_of(reference), gpu_named(name), asked) for name in gpu]
    print(dumps(as_json(model, plans)) if json else as_table(model, plans))
    return 0


@_commands.command("eval", cls=SeveralValues)
def evaluate(
    url: Annotated[str | None, option(SERVER)] = None,
    model: Annotated[str | None, option(ENCODER, "DIR|RECIPE")] = None,
    stages: Annotated[
        str | None, option("a recipe's base: causal, bidirectional, then with one more adapter each time", "RECIPE")
    ] = None,
    adapter: Annotated[
        _Texts, option("with --stages: these adapters, in this order, instead of the recipe's", "REF")
    ] = None,
    sts: Annotated[_Paths, option("TSV or JSON lines with score, sentence1 and sentence2", "FILE")] = None,
    words: Annotated[
        _Paths,
        option("word-level probes: CoNLL columns (CoNLL-2000, CoNLL-2003, CoNLL-U, or word and tag)", "TRAIN TEST"),
    ] = None,
    classification: Annotated[
        _Paths, option("a probe of text vectors: TSV or JSON lines with text and label", "TRAIN TEST")
    ] = None,
    retrieval: Annotated[_Paths, option("corpus.jsonl, queries.jsonl and qrels/test.tsv, as in BEIR", "DIR")] = None,
    mteb: Annotated[_Texts, option("a task of MTEB by its name; needs the extra eval", "TASK")] = None,
    instruction: Annotated[
        str | None, option("instruction before texts of --sts and --classification, instead of the encoder's default")
    ] = None,
    query_instruction: Annotated[
        str | None, option("instruction before queries of --retrieval, instead of the encoder's own; '' for none")
    ] = None,
    document_instruction: Annotated[str | None, option("the same before documents of --retrieval")] = None,
    mteb_instructions: Annotated[
        Path | None, option("{task: instruction} for --mteb, instead of the encoder's own", "FILE.json")
    ] = None,
    probe_limit: Annotated[
        int | None, option("fit probes to this many of TRAIN, drawn at random but the same each time")
    ] = None,
    pooling: _Poolings = None,
    device: Annotated[str, option(DEVICE)] = "auto",
    dtype: Annotated[Arithmetic, option(ARITHMETIC)] = "auto",
    json: Annotated[Path | None, option("write the scores to this file", "FILE")] = None,
    picture: Annotated[Path | None, option("draw the scores to this file: .png, .svg or .pdf", "FILE")] = None,
) -> int:
    """Measure vectors: similarity, retrieval, probes, MTEB.

    Scores of a server, an encoder, or each stage of making one. Data files may be .gz.
    """
    options = _given(locals())
    if not at_most_one(url=url, model=model, stages=stages):
        raise typer.BadParameter("give one of --url, --model and --stages")
    if wrong := [mode for mode in pooling or () if mode not in _POOLINGS]:
        raise typer.BadParameter(f"{wrong[0]!r} is not one of {', '.join(_POOLINGS)}", param_hint="--pooling")

    from model_store.evaluation.command import Asked, ServerVectors, evaluate
    from service.bulk.client import embed_texts, served_prompts

    paired: dict[str, Any] = {
        name: pairs(name, options[name]) for name in ("words", "classification") if name in options
    }
    folder = load_settings({}).models_dir.expanduser()
    server = ServerVectors(partial(embed_texts, url or ""), partial(served_prompts, url or ""))
    evaluate(Asked(**options | paired), server, folder, ProgressBar())
    return 0


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@_commands.command()
def train(
    stage: Annotated[Literal["mntp", "simcse", "supervised"], argument("what to train")],
    config: Annotated[Path, argument("as the official LLM2Vec scripts read it", "CONFIG.json")],
    resume: Annotated[bool, option("go on from the newest checkpoint in its output_dir", name="--resume")] = False,
) -> int:
    """Train an adapter that makes a decoder an encoder."""
    from model_store.training.config import read_config
    from model_store.training.run import train
    from service.bulk.client import embed_texts

    print(train(read_config(stage, config), resume, embed_by_server=embed_texts))
    return 0


_commands.add_typer(training_commands)


def _read_limit(folder: Path) -> str:
    kind = limited_by(read_json_object(folder / CONFIG_FILE))
    return f" (its base reads more: beyond them {kind} RoPE would depend on batch mates)" if kind else ""


def _source(reference: str, commit: str | None) -> str:
    return f"{reference} ({commit})" if commit else reference
