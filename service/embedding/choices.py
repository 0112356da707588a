"""Words that a request, or the command, chooses among."""

from __future__ import annotations

from typing import Literal

# What happens to an input that is longer than the server reads: refused, cut, or read in chunks whose mean it gets.
Overflow = Literal["error", "truncate", "mean"]

# How the numbers of a vector are given or stored.
EmbedDtype = Literal["float32", "float16", "int8", "uint8", "ubinary", "binary"]
