"""The options of `llm2vec-service embed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.bulk.reading import Kind
from service.embedding.choices import EmbedDtype, Overflow

FileFormat = Literal["parquet", "safetensors"]
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Asked:
    """The command's options; see `llm2vec-service embed --help`. For None, the settings decide."""

    inputs: Sequence[Path]
    out: Path
    url: str | None = None
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    input_format: Kind | None = None
    text_column: str = "text"
    id_column: str | None = None
    carry: Sequence[str] = ()
    instruction: str = ""
    dimensions: int | None = None
    overflow: Overflow = "error"
    embed_dtype: EmbedDtype = "float32"
    format: FileFormat = "parquet"
    rows_per_shard: int = 10_000
    on_error: OnError = "stop"
    overwrite: bool = False
    concurrency: int = 16
