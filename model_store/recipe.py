"""The input of `build`: a base, adapters in their order, and the pooling of the vectors."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from model_store.architectures import Attention
from model_store.errors import UserError
from model_store.pooling_modes import PoolingMode
from model_store.tables import packaged_tables
from model_store.templates import TEMPLATES, SpanCount, Template

DType = Literal["bfloat16", "float32"]

# Numbers of dimensions, each once and ascending.
Widths = Annotated[tuple[PositiveInt, ...], AfterValidator(lambda given: tuple(sorted(set(given))))]


# The official library's defaults (llm2vec 0.2.3, `LLM2Vec.__init__`).
ENCODER_DEFAULTS = {
    "attention": "bidirectional",
    "pooling": "mean",
    "skip_instruction": True,
    "span_count": "text",
    "max_length": 512,
    "doc_max_length": 400,
}

# Keys of a recipe, and of its template, that the first version did not have. Their defaults ask for nothing.
_LATER = ("attention", "document_instruction", "span_count", "head_tensor", "widths", "ignored_config_keys")
_LATER_IN_TEMPLATES = ("lead", "bare_lead", "trail")

# Stages of LLM2Vec's training → what a recipe that ends with them says, and the end of the second adapter's name.
_STAGES = {
    "mntp": ("MNTP only", ""),
    "simcse": ("MNTP, then unsupervised SimCSE", "unsup-simcse"),
    "supervised": ("MNTP, then supervised contrastive learning", "supervised"),
}

# Keys that change no vector.
_MOVES_NOTHING = {"name", "description", "evidence", "parameters", "gated", "described_by_files"}


class RecipeError(UserError):
    """A recipe that cannot be read, or that asks for something that does not exist."""


def is_plain_name(name: str) -> bool:
    """Whether the name can only mean something directly in a folder."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


class Recipe(BaseModel):
    """One encoder to build.

    `base` and `adapters` are references as `sources.resolve` reads them; adapters are merged in their order. What is
    None, and roles' instructions that are "", come from the files beside the last adapter or the base that describe an
    encoder (`build.description`); else the base's name chooses the `template`, and the rest is in `ENCODER_DEFAULTS`.
    With `described_by_files` a base without such files is refused. `ignored_config_keys` are keys of the base's
    config.json that would be refused as not reproduced.

    `max_length` and `doc_max_length` are in tokens, the official library's limits. `head_tensor` names a tensor of the
    base that is the weight of a linear layer behind the decoder, such as voyage-4-nano's. `widths` are the numbers of
    dimensions that vectors may be cut to, as a Matryoshka loss had them in training; none says that they are unknown.
    A server puts `query_instruction` before queries, and `document_instruction` before documents, when a client only
    says which of them its input is.

    `evidence` (what the vectors were compared with), `parameters` (of the encoder, without output head) and `gated`
    (the hub asks to accept the base's licence) help people to choose a recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    base: str = Field(min_length=1)
    adapters: tuple[str, ...] = ()
    attention: Attention | None = None
    template: Template | None = None
    pooling: PoolingMode | None = None
    skip_instruction: bool | None = None
    span_count: SpanCount | None = None
    max_length: int | None = Field(default=None, ge=1)
    doc_max_length: int | None = Field(default=None, ge=1)
    dtype: DType = "bfloat16"
    head_tensor: str = ""
    query_instruction: str = ""
    document_instruction: str = ""
    widths: Widths = ()
    ignored_config_keys: tuple[str, ...] = ()
    described_by_files: bool = False
    description: str = ""
    evidence: str = ""
    parameters: int | None = Field(default=None, ge=1)
    gated: bool = False

    @field_validator("name")
    @classmethod
    def _name_a_folder(cls, name: str) -> str:
        if not is_plain_name(name):
            raise ValueError(f"{name!r} can't be a folder's name, which a recipe's name becomes")
        return name

    @property
    def fingerprint(self) -> str:
        """A sha256 over everything that changes a vector; encoders of different recipes have different fingerprints."""
        # What recipes could not ask for when the first encoders were built is left out while it is not asked for.
        unasked = {key for key in _LATER if getattr(self, key) == Recipe.model_fields[key].default}
        asked = self.model_dump(mode="json", exclude=_MOVES_NOTHING | unasked)
        for key in _LATER_IN_TEMPLATES if self.template else ():
            if asked["template"][key] == getattr(Template(), key):
                del asked["template"][key]
        return hashlib.sha256(json.dumps(asked, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def read_recipe(text: str, name: str) -> Recipe:
    """A recipe from TOML; `name` is its name if the text gives none.

    Raises:
        RecipeError: for bad TOML, an unknown or missing key, or a value that makes no sense.
    """
    try:
        return recipe_from(**{"name": name, **tomllib.loads(text)})
    except (tomllib.TOMLDecodeError, RecipeError) as error:
        raise RecipeError(f"recipe {name}: {error}") from error


def packaged_recipes() -> dict[str, Recipe]:
    """Every recipe that ships with the package, by name. Those with adapters, which are LLM2Vec's, come first."""
    recipes = packaged_tables("recipes/others.toml")
    for family, row in packaged_tables("recipes/llm2vec.toml").items():
        [mntp] = row["adapters"]
        for stage in row.pop("stages"):
            told, second = _STAGES[stage]
            recipes[f"{family}-{stage}"] = {
                **row,
                "description": f"{row['description']}: {told}",
                "adapters": [mntp, f"{mntp}-{second}"] if second else [mntp],
                "template": TEMPLATES.get(row["base"], Template()),
            }
    ordered = sorted(recipes, key=lambda name: ("adapters" not in recipes[name], name))
    return {name: recipe_from(name, **recipes[name]) for name in ordered}


def load_recipe(name_or_file: str) -> Recipe:
    """A packaged recipe by name, or one from a .toml file.

    Raises:
        RecipeError: if there is no such recipe or file, naming the packaged recipes.
    """
    if name_or_file.endswith(".toml"):
        path = Path(name_or_file)
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {name_or_file}")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"the recipe file {name_or_file} is not valid UTF-8: {error}") from error
        return read_recipe(text, path.stem)
    recipes = packaged_recipes()
    if name_or_file not in recipes:
        raise RecipeError(
            f"there is no recipe {name_or_file!r}: use one of {', '.join(recipes)}, or a path to a .toml file"
        )
    return recipes[name_or_file]


def recipe_from(name: str, **values: object) -> Recipe:
    """A recipe from parts; parts that are None keep their default.

    Raises:
        RecipeError: for a value that makes no sense.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return Recipe.model_validate({"name": name, **given})
    except ValidationError as error:
        issues = (f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in error.errors())
        raise RecipeError("; ".join(issues)) from error
