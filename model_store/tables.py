"""The packaged tables: recipes, and the shapes of their bases. It knows TOML, and nothing of what the tables say."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any


def packaged_tables(file: str) -> dict[str, dict[str, Any]]:
    """The tables of a packaged TOML file, by name.

    Keys before the first table hold for all of them, and those of a table above for one that is `like` it.
    """
    content = tomllib.loads((files("model_store") / file).read_text())
    common = {key: value for key, value in content.items() if not isinstance(value, dict)}
    tables: dict[str, dict[str, Any]] = {}
    for name, own in content.items():
        if isinstance(own, dict):
            tables[name] = {**common, **tables.get(own.pop("like", ""), {}), **own}
    return tables
