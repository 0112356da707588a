"""The instruction that goes before an input, chosen from all places of a request that may name one. No HTTP here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from model_store.manifest import ROLES, Manifest, Role
from model_store.templates import Template
from model_store.text.prompts import EncoderPrompts, Prompt, UnknownPrompt, find_prompt, read_prompts
from service.errors import InvalidRequest, ModelNotFound, StartupError
from service.settings import Settings

Source = Literal["item", "text", "request", "input_type", "alias", "header", "default", "none"]

# The models that OpenAI's clients ask for by default: here they are further names of the one model.
OPENAI_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"})


class Chosen(NamedTuple):
    """An instruction ("" for none) and where it came from."""

    text: str = ""
    source: Source = "none"


NONE = Chosen()


@dataclass(frozen=True)
class Instructions:
    """The server's instructions and prompts.

    `query` is the instruction of queries and `document` that of documents, which LLM2Vec's encoders have none of;
    `default_name` is the role or prompt of requests that name none, or ""; `lead` is that of the encoder's template.
    """

    query: str
    prompts: Mapping[str, Prompt]
    document: str = ""
    default_name: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)  # further model names → role or prompt, or ""
    any_model: bool = False
    lead: str = Template().lead

    def choose(
        self,
        instruction: str | None = None,
        names: Mapping[str, str | None] = {},
        alias: str = "",
        header_instruction: str | None = None,
        header_name: str | None = None,
    ) -> Chosen:
        """The instruction for the inputs of a request that have none of their own: the first argument to name one wins.

        `names` are the request's input_type, prompt_name and task, and `alias` is the role or prompt that the model's
        name asks for.

        Raises:
            InvalidRequest: for an unknown name, or two that contradict each other at one level.
        """
        if instruction is not None:
            return Chosen(instruction, "request")
        if given := {field: name for field, name in names.items() if name}:
            return Chosen(self.named(given), "input_type")
        if alias:
            return Chosen(self.named({"model": alias}), "alias")
        if header_instruction is not None or header_name is not None:
            return Chosen(self._from_headers(header_instruction, header_name), "header")
        if self.default_name:
            return Chosen(self.named({"default_input_type": self.default_name}), "default")
        return NONE

    def named(self, names: Mapping[str, str]) -> str:
        """The instruction that roles and prompts stand for: a role beside a prompt chooses the prompt's side.

        A prompt alone stands for its side for queries.

        Raises:
            InvalidRequest: for an unknown name, or two roles or two prompts.
        """
        role: Role | None = None
        prompt: tuple[str, Prompt] | None = None
        for param, name in names.items():
            if (as_role := ROLES.get(name.lower())) is not None:
                if role not in (None, as_role):
                    raise _contradiction(names, param)
                role = as_role
                continue
            try:
                found = (name.casefold(), find_prompt(self.prompts, name))
            except UnknownPrompt as error:
                near = f"did you mean {' or '.join(error.close)}? " if error.close else ""
                raise InvalidRequest(
                    f"there is no {param} {name[:100]!r}: {near}use one of {', '.join(ROLES)}, or a prompt's name "
                    "(GET /v1/prompts lists them)",
                    "invalid_input_type",
                    param,
                ) from error
            if prompt is not None and prompt[0] != found[0]:
                raise _contradiction(names, param)
            prompt = found
        if prompt is not None:
            return prompt[1].document if role == "document" else prompt[1].query
        return self.of(role) if role else ""

    def of(self, role: Role) -> str:
        """The instruction of a role, "" for none."""
        return self.query if role == "query" else self.document

    def alias_of(self, model: str | None, served: str) -> str:
        """The role or prompt that a model's name asks for: `served:query`, or an alias; "" for none.

        OpenAI's names of its models stand for the served one.

        Raises:
            ModelNotFound: if the server has no model of this name.
        """
        if model is None or model == served:
            return ""
        if model in self.aliases:
            return self.aliases[model]
        if model in OPENAI_MODELS:
            return ""
        name, _, alias = model.partition(":")
        if alias and (name == served or name in OPENAI_MODELS):
            return alias
        if self.any_model:
            return ""
        raise ModelNotFound(model, served)

    def _from_headers(self, instruction: str | None, name: str | None) -> str:
        by_name = None if name is None else self.named({"x-input-type": name})
        if instruction is None or by_name is None or instruction == by_name:
            return instruction if instruction is not None else by_name or ""
        raise InvalidRequest(
            "the headers x-instruction and x-input-type ask for different instructions: send one of them",
            "conflicting_instructions",
            "x-instruction",
        )


def load_instructions(settings: Settings, manifest: Manifest) -> Instructions:
    """The instructions and prompts of this server.

    Raises:
        StartupError: for a setting that names an unknown prompt.
    """
    own = settings.query_instruction
    prompts = EncoderPrompts.of(manifest)
    known = Instructions(
        query=manifest.query_instruction if own is None else own,
        document=manifest.document_instruction,
        prompts={
            **prompts.by_name,
            **(read_prompts(settings.prompts_file) if settings.prompts_file else {}),
        },
        default_name=settings.default_input_type or manifest.default_prompt,
        aliases=settings.model_aliases,
        any_model=settings.any_model,
        lead=prompts.lead,
    )
    for name in (settings.default_input_type, *settings.model_aliases.values()):
        try:
            known.named({"name": name} if name else {})
        except InvalidRequest as error:
            raise StartupError(f"settings name a prompt: {error}") from error
    return known


def _contradiction(names: Mapping[str, str], param: str) -> InvalidRequest:
    said = ", ".join(f"{field} {name[:100]!r}" for field, name in names.items())
    return InvalidRequest(f"{said} contradict each other: send one of them", "conflicting_instructions", param)
