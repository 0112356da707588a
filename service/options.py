"""The command's options: one for each setting of the server, and what typer does not do for the others by itself.

Knows no subcommand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from model_store.recipe import DType
from service.settings import SECRETS, Settings, meaning_of

# The headings of `serve --help`, each by the first setting below it.
_HEADINGS = {
    "model": "Model and texts",
    "device": "Device and batches",
    "host": "HTTP and limits",
    "api_keys": "Security",
    "playground": "Operations",
}

# Options that take several values after one name, and how many at most.
_SEVERAL = {"--gpu": sys.maxsize, "--weights": sys.maxsize, "--words": 2, "--classification": 2}

# The meaning of options that several subcommands have.
SERVER = "a running server, such as http://127.0.0.1:8000"
ENCODER = "a stored encoder, or a recipe, which is built if needed"
DEVICE = "auto, cpu, cuda or cuda:N"
ARITHMETIC = "arithmetic, as in `serve`"

Arithmetic = Literal["auto", DType]


def signature_of_settings() -> Signature:
    """The signature of `serve`, from which typer makes the options: one for each setting that is no secret."""
    options, heading = [], ""
    for name, field in Settings.model_fields.items():
        heading = _HEADINGS.get(name, heading)
        if name not in SECRETS:
            options.append(_option_of(name, field, heading))
    return Signature([Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context), *options])


def given_settings(context: typer.Context) -> dict[str, Any]:
    """The settings that the command line names, without the defaults, which would win over variables."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _option_of(name: str, field: FieldInfo, group: str) -> Parameter:
    """A setting's option. Its value stays a text here: `load_settings` checks it, as it checks a variable's."""
    optional = type(None) in get_args(field.annotation)
    kind: Any = get_args(field.annotation)[0] if optional else field.annotation
    choices = ("true", "false") if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
    types = {Path: "path", int: "int", float: "float", dict[str, str]: "json"}
    signs = {"ge": ">=", "gt": ">", "le": "<="}
    bounds = [f"x{signs[key]}{getattr(rule, key)}" for rule in field.metadata for key in signs if hasattr(rule, key)]
    shown = "|".join(choices) or types.get(kind, "str")
    default = None if field.default in (None, "", ()) else str(field.default)
    made = typer.Option(
        help=meaning_of(field),
        metavar=_narrow(f"<{shown}> [{', '.join(bounds)}]" if bounds else f"<{shown}>"),
        autocompletion=offered(choices),
        rich_help_panel=group,
    )
    return Parameter(
        name,
        Parameter.KEYWORD_ONLY,
        default=default.lower() if default and kind is bool else default,
        annotation=Annotated[str | None, made],
    )


def _narrow(shown: str) -> str:
    """In lines so short that a terminal of 80 columns has room for the option's whole name beside them."""
    return "\n".join(wrap(shown.replace("|", "| "), 16)).replace("| ", "|")


def offered(choices: Iterable[str]) -> Callable[[], list[str]]:
    """The values that the shell's completion offers."""
    return lambda: list(choices)


def option(meaning: str, shown: str | None = None, name: str | None = None, **more: Any) -> Any:
    """An option of this meaning, whose value the help shows as `shown`: by default as its type."""
    # With readable=True typer itself refuses a file that can't be read; the subcommand's own error says more.
    return typer.Option(*([name] if name else []), help=meaning, metavar=shown, readable=False, **more)


def argument(meaning: str, shown: str | None = None) -> Any:
    return typer.Argument(help=meaning, metavar=shown, readable=False)


class SeveralValues(TyperCommand):
    """A subcommand some of whose options take several values: `--gpu l4 h200` means `--gpu l4 --gpu h200`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_one_value_each(args)))


def _one_value_each(arguments: Iterable[str]) -> Iterator[str]:
    name, values = "", 0
    for given in arguments:
        if given.startswith("-"):
            name, values = given, 0
        else:
            if 0 < values < _SEVERAL.get(name, 0):
                yield name
            values += 1
        yield given


def at_most_one(**options: object) -> list[str]:
    """Those of these options that are given, which are one or none.

    Raises:
        BadParameter: for more.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"not allowed with {given[0]}", param_hint=given[1])
    return given


def pairs(name: str, files: Sequence[Path]) -> list[tuple[Path, Path]]:
    if len(files) % 2:
        raise typer.BadParameter("two files are needed, TRAIN and TEST", param_hint=f"--{name}")
    return list(zip(files[::2], files[1::2], strict=True))
