"""The words that a request or the command `embed` can choose between."""

from __future__ import annotations

from typing import Literal

# An input that is longer than the server reads is refused, cut, or read in chunks whose mean is its vector.
Overflow = Literal["error", "truncate", "mean"]

# The numbers that vectors are sent or stored as.
EmbedDtype = Literal["float32", "float16", "int8", "uint8", "ubinary", "binary"]
