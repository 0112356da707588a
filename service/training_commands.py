"""The subcommands that make training data, and one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.options import SeveralValues, argument, option

training_commands = typer.Typer()


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
