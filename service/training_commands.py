"""The subcommands that make training data, and one adapter of several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from model_store.build.progress import bar_class
from model_store.text.files import appearing_whole
from model_store.training.text_pairs import INSTRUCTIONS, TextPairs
from service.bulk.reading import BadRow, Columns, InputError, find_inputs
from service.options import SeveralValues, argument, option

training_commands = typer.Typer()

_INPUTS = "files of texts, or folders, as `embed` reads them"


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
