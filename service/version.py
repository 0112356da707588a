"""The installed package's version; 0 if the code runs from a folder that was never installed."""

from __future__ import annotations

from importlib import metadata

try:
    VERSION = metadata.version("llm2vec-service")
except metadata.PackageNotFoundError:
    VERSION = "0"
