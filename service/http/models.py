"""The names of the one model that is served."""

from __future__ import annotations

from service.errors import ModelNotFound
from service.http.parts import Parts


def model_names(parts: Parts) -> list[str]:
    """The names by which clients may ask for the model."""
    served = parts.served_name
    return [served, f"{served}:query", f"{served}:document", *parts.instructions.aliases]


def alias_of(parts: Parts, model: str | None) -> str:
    """The role or prompt that a model's name asks for.

    Raises:
        ModelNotFound: if no model here has that name.
    """
    return parts.instructions.alias_of(model, parts.served_name)


def check_model(parts: Parts, model: str, alias: str) -> None:
    """Check a model's name where no instruction is asked for.

    Raises:
        ModelNotFound: if the role or prompt in the name does not exist.
    """
    if alias and not parts.instructions.knows(alias):
        raise ModelNotFound(model, parts.served_name)
