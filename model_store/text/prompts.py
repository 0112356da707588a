"""Prompts by name: the instructions with which LLM2Vec's published vectors were made, from prompts.toml.

Another instruction gives other vectors. A prompt's name does not say which models were trained with its instruction.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from model_store.errors import UserError
from model_store.templates import Template

if TYPE_CHECKING:
    from model_store.manifest import Manifest

# A longer name is not compared with the prompts' names: it is no mistyped one.
_MOST_CHARACTERS = 200


class UnknownPrompt(UserError):
    """A name that no prompt has; `close` are similar names, the most similar first."""

    def __init__(self, name: str, close: Sequence[str]) -> None:
        hint = f": did you mean {' or '.join(close)}?" if close else ""
        super().__init__(f"there is no prompt named {name!r}{hint}")
        self.close = tuple(close)


class PromptsFileError(UserError):
    """A file that can't be read as prompts."""


@dataclass(frozen=True)
class Prompt:
    """The instructions for the two sides, "" for none. They end without a space: the tokenizer adds it."""

    query: str
    document: str


@dataclass(frozen=True)
class EncoderPrompts:
    """An encoder's prompts by name, and the `lead` of its template: where an instruction stands."""

    by_name: Mapping[str, Prompt]
    lead: str = Template().lead

    @classmethod
    def of(cls, manifest: Manifest) -> EncoderPrompts:
        """The packaged prompts, written for LLM2Vec's lead, where the encoder has that lead; and the encoder's own."""
        own = {name: Prompt(prompt, prompt) for name, prompt in manifest.prompts.items()}
        lead = manifest.template.lead
        return cls({**(load_prompts() if lead == Template().lead else {}), **own}, lead)


def load_prompts() -> dict[str, Prompt]:
    """The packaged prompts: by MTEB's task names, and by kind (`query`, `sts`, …)."""
    return _prompts(files("model_store.text").joinpath("prompts.toml").read_text(encoding="utf-8"))


def read_prompts(file: Path) -> dict[str, Prompt]:
    """The prompts in a user's file, which is written like the packaged one.

    Raises:
        PromptsFileError: if the file is written otherwise; the message says where.
        OSError: if the file can't be read.
    """
    try:
        return _prompts(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise PromptsFileError(f"{file}: {error}") from error


def _prompts(text: str) -> dict[str, Prompt]:
    prompts = {}
    for name, entry in tomllib.loads(text).items():
        sides = {"query": entry, "document": entry} if isinstance(entry, str) else entry
        if not (isinstance(sides, dict) and sides.keys() <= {"query", "document"} and "query" in sides) or not all(
            isinstance(side, str) for side in sides.values()
        ):
            raise ValueError(f"{name} must be an instruction, or {{ query = …, document = … }}")
        prompts[name] = Prompt(sides["query"], sides.get("document", ""))
    return prompts


def find_prompt(prompts: Mapping[str, Prompt], name: str) -> Prompt:
    """The prompt named `name`, whether in capitals or not.

    Raises:
        UnknownPrompt: if no prompt has this name.
    """
    if name in prompts:
        return prompts[name]
    names = {known.casefold(): known for known in reversed(list(prompts))}  # of names that are alike the first counts
    folded = name.casefold()
    if folded in names:
        return prompts[names[folded]]
    close = get_close_matches(folded, names) if len(name) <= _MOST_CHARACTERS else []
    raise UnknownPrompt(name, [names[found] for found in close])
