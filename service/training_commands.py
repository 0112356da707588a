"""The subcommands that make training data, and one adapter of several."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from model_store.build.progress import ProgressBar, bar_class
from model_store.evaluation.command import EmbedTexts, stored_encoder
from model_store.manifest import Role
from model_store.text.files import appearing_whole
from model_store.training.text_pairs import INSTRUCTIONS, TextPairs
from service.bulk.reading import BadRow, Columns, InputError, find_inputs
from service.options import ARITHMETIC, ENCODER, SERVER, Arithmetic, SeveralValues, argument, at_most_one, option
from service.settings import load_settings

training_commands = typer.Typer()

_INPUTS = "files of texts, or folders, as `embed` reads them"


@training_commands.command()
def mine(
    file: Annotated[Path, argument("pairs, as supervised training reads them", "PAIRS")],
    out: Annotated[Path, option("the JSON lines to write", "FILE.jsonl")],
    url: Annotated[str | None, option(SERVER)] = None,
    model: Annotated[str | None, option(ENCODER, "DIR|RECIPE")] = None,
    corpus: Annotated[
        list[Path] | None, option(f"{_INPUTS}, that may be negatives, as the pairs' own may", "INPUT")
    ] = None,
    num_negatives: Annotated[int, option("most negatives of a pair")] = 3,
    range_min: Annotated[int, option("leave out so many of the nearest")] = 0,
    range_max: Annotated[int | None, option("the last rank that may be a negative")] = None,
    max_score: Annotated[float | None, option("leave out what is nearer to the query")] = None,
    min_score: Annotated[float | None, option("leave out what is farther from the query")] = None,
    absolute_margin: Annotated[float | None, option("how far a negative must score below the positive")] = None,
    relative_margin: Annotated[float | None, option("the same, as a share of the positive's score")] = None,
    duplicate_score: Annotated[
        float | None, option("leave out what is nearer to a positive, or to another negative, than this")
    ] = None,
    sampling_strategy: Annotated[Literal["top", "random"], option("which of the candidates")] = "top",
    seed: Annotated[int, option("of the random strategy")] = 0,
    query_instruction: Annotated[
        str | None, option("instruction before queries, instead of the pairs' or the encoder's own; '' for none")
    ] = None,
    document_instruction: Annotated[str | None, option("the same before documents")] = None,
    output_scores: Annotated[bool, option("write the passages' scores too", name="--output-scores")] = False,
    text_column: Annotated[str, option("the column of the corpus' texts", "COLUMN")] = "text",
    device: Annotated[str, option("as in `eval`; the search is computed there too")] = "auto",
    dtype: Annotated[Arithmetic, option(ARITHMETIC, "<auto|\nbfloat16|\nfloat32>")] = "auto",
) -> int:
    """Find hard negatives for pairs, by exact search.

    A job that was cut off goes on when the same command is given again.
    """
    if not at_most_one(url=url, model=model):
        raise typer.BadParameter("give one of --url and --model")
    _check_out(out)

    from model_store.encoder.devices import choose_device
    from model_store.training.mining import Miner, Pool
    from model_store.training.negatives import Rules
    from model_store.training.texts import read_contrastive

    options = locals()
    rules = Rules(**{name: options[name] for name in Rules.__dataclass_fields__})
    texts = (text for text, _ in _texts(corpus, text_column)) if corpus else ()
    pool = Pool.of(read_contrastive(file), texts, query_instruction, document_instruction)
    embed, encoder = _server(url) if url else _encoder(str(model), device, dtype)
    mined = Miner(embed, encoder, rules, choose_device(device), output_scores).mine(pool, out)
    print(f"{out}: {mined.pairs} of {len(pool.pairs)} pairs, with {mined.negatives} negatives")
    for name, count in mined.left_out.items():
        print(f"  left out by {name}: {count} candidates")
    return 0


def _server(url: str) -> tuple[EmbedTexts, str]:
    """The function that asks a running server, and its embedding space."""
    from service.bulk.client import ServerClient, embed_texts

    async def space() -> str:
        async with ServerClient(url) as client:
            return (await client.served_model()).embedding_space

    return partial(embed_texts, url), asyncio.run(space())


def _encoder(model: str, device: str, dtype: Arithmetic) -> tuple[EmbedTexts, str]:
    """The function that asks an encoder in this process, and what its vectors depend on."""
    from model_store.evaluation.local import LocalEncoder

    folder = stored_encoder(model, load_settings({}).models_dir.expanduser(), ProgressBar())
    local = LocalEncoder.load(folder, device=device, dtype=dtype)
    encoder = local.encoder

    def embed(texts: Sequence[str], instruction: str | None, role: Role | None) -> NDArray[np.float32]:
        (vectors,) = local.embed(texts, instruction, role).values()
        return vectors

    return embed, f"{encoder.manifest.embedding_space} in {encoder.dtype} on {encoder.device.type}"


@training_commands.command("pairs")
def make_pairs(
    inputs: Annotated[list[Path], argument(_INPUTS, "INPUT")],
    out: Annotated[Path, option("the JSON lines to write", "FILE.jsonl")],
    task: Annotated[
        list[str] | None,
        option("what pairs are made of, by default all; repeat it for several", f"<{'|'.join(INSTRUCTIONS)}>"),
    ] = None,
    instruction: Annotated[
        str | None, option("instruction of all queries, instead of one for each task; '' for none")
    ] = None,
    keep_sentence: Annotated[float, option("chance that a sentence stays in its text", min=0, max=1)] = 0.1,
    seed: Annotated[int, option("of all that is left to chance", min=0)] = 0,
    text_column: Annotated[str, option("the column of the texts", "COLUMN")] = "text",
    title_column: Annotated[str, option("the column of the titles, which need not be there", "COLUMN")] = "title",
) -> int:
    """Make pairs of plain texts, for supervised training without labels."""
    _check_out(out)
    if wrong := [name for name in task or () if name not in INSTRUCTIONS]:
        raise typer.BadParameter(f"{wrong[0]!r} is not one of {', '.join(INSTRUCTIONS)}", param_hint="--task")
    tasks = [name for name in INSTRUCTIONS if name in (task or INSTRUCTIONS)]
    texts = TextPairs(tasks, seed, instruction, keep_sentence)
    rows = _texts(inputs, text_column, title_column)
    with appearing_whole(out) as file, bar_class()(rows, unit="text") as bar:
        for pair in texts.of(bar):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
        if not texts.made:
            raise InputError(f"no pair can be made of {', '.join(map(str, inputs))}: give longer texts, or other tasks")
    counts = ", ".join(f"{count} of {name}" for name, count in texts.made.items())
    print(f"{out}: {texts.made.total()} pairs ({counts}); {texts.repeated} texts and queries were there before")
    return 0


def _texts(
    inputs: Sequence[Path], text_column: str, title_column: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """(text, title) of each row that is not blank.

    Raises:
        InputError: for a bad row, and for a file without the column of the texts.
    """
    for one in find_inputs(inputs):
        names = one.names(Columns(text_column))
        titled = (title_column,) if title_column and (names is None or title_column in names) else ()
        for row in one.read(Columns(text_column, None, titled)):
            if isinstance(row, BadRow):
                raise InputError(f"{one.where(row.line)}: {row.reason}")
            if row.text.strip():
                yield row.text, (row.values[0] or None) if titled else None


def _check_out(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise typer.BadParameter(f"{out} must end in .jsonl, for training to read it", param_hint="--out")
    if out.exists():
        raise InputError(f"{out} is there already: choose another --out, or remove it")


@training_commands.command(cls=SeveralValues)
def merge(
    adapters: Annotated[list[str], argument("LoRA adapters of the same stage on the same base", "REF")],
    weights: Annotated[list[float], option("the weight of each adapter; of one adapter, its strength", "NUMBER...")],
    out: Annotated[Path, option("the folder to write", "DIR")],
    combination_type: Annotated[
        Literal["cat", "svd", "linear"],
        option(
            "cat: the sum itself, ranks add up; svd: the nearest of a rank; linear: of A and of B apart, as in peft"
        ),
    ] = "cat",
    svd_rank: Annotated[int | None, option("rank for svd; by default the largest of the adapters")] = None,
) -> int:
    """Combine adapters into one, by a weighted sum of their updates."""
    from model_store.build.combination import combine_adapters

    found = combine_adapters(adapters, weights, out, combination_type, svd_rank)
    away = "the weighted sum itself" if found.error < 1e-6 else f"{found.error:.1%} away from the weighted sum"
    print(f"{out}: rank {found.rank}, {away.replace('%', ' %')}")
    return 0
