"""The stored encoder's own description, `manifest.json`: what it was made from and every file it consists of.

It knows the folder's layout and how to check that the folder is complete; it knows nothing of tensors.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from model_store.architectures import Attention
from model_store.config_keys import vector_settings
from model_store.errors import UserError
from model_store.pooling_modes import PoolingMode
from model_store.recipe import DType, Recipe, Widths, is_plain_name
from model_store.templates import SpanCount, Template

# Format 1 had none of the fields with a default. Up to format 2 the embedding-space id covered every byte of
# config.json, which another version of transformers writes otherwise.
FORMAT = 3
_READ = range(1, FORMAT + 1)

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

# What int8 needs to know, beside the weights: vectors without int8 are not moved by it.
CALIBRATION_FILE = "int8.safetensors"

# What a text is in a search.
Role = Literal["query", "document"]

# The names that clients, and encoders' own prompts, have for the two roles.
ROLES: dict[str, Role] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
    "retrieval.passage": "document",
}

# Names of files that a library might read as a part of a model. Others, such as a README, change no vector.
_READ_FILES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".py", ".txt", ".jinja")


class StoreError(UserError):
    """A folder that is not a whole, unchanged stored encoder."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredFile(_Frozen):
    """One file of the folder: its size in bytes and the sha256 of its content."""

    size: int
    sha256: str


class SourceRecord(_Frozen):
    """Where weights came from: the reference as given, and the hub commit it was pinned to, if any.

    `content` is the sha256 of the files of a local folder, which may be trained again in its place.
    """

    reference: str
    commit: str | None = None
    content: str = ""

    @classmethod
    def of(cls, reference: str, commit: str | None) -> SourceRecord:
        """The record of a source as it is now."""
        return cls(reference=reference, commit=commit, content="" if commit else _content_of(reference))

    @property
    def changed(self) -> bool:
        """Whether the folder is there and holds other files than it did. Reads every byte of it."""
        return bool(self.content) and _content_of(self.reference) not in (self.content, "")


class Manifest(_Frozen):
    """A stored encoder: its sources, how it reads and pools text, its limits in tokens, and its files.

    `widths` are those that vectors may be cut to, the whole `width` among them; none means that they are not known.
    """

    format: int = FORMAT
    name: str
    model_type: str
    width: int
    max_positions: int
    vocabulary: int
    parameters: int
    dtype: DType
    attention: Attention = "bidirectional"
    base: SourceRecord
    adapters: tuple[SourceRecord, ...]
    tokenizer: str
    template: Template
    pooling: PoolingMode
    skip_instruction: bool
    span_count: SpanCount = "text"
    max_length: int
    doc_max_length: int
    query_instruction: str
    document_instruction: str = ""
    widths: Widths = ()
    prompts: dict[str, str] = {}
    default_prompt: str = ""
    recipe: Recipe
    recipe_fingerprint: str
    tools: dict[str, str]
    files: dict[str, StoredFile]
    embedding_space: str = ""

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        for name in files:
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is not the name of a file in this folder")
        return files

    def instruction_of(self, role: Role | None = None) -> str:
        """The instruction of texts that nobody names one for: that of their role, else the encoder's default prompt."""
        role = role or ROLES.get(self.default_prompt.lower())
        if role is None:
            return self.prompts.get(self.default_prompt, "")
        return self.query_instruction if role == "query" else self.document_instruction

    def sealed(self, folder: Path) -> Manifest:
        """The same manifest with its `embedding_space` filled in: vectors of two spaces must not be compared.

        It is 16 hex digits that change whenever a vector could: a hash of the weights and the tokenizer files, of what
        the folder's config.json says that moves vectors, and of the attention, the template, the pooling and the span.
        """
        config = json.loads((folder / CONFIG_FILE).read_text())
        template = self.template
        # What format 1 did not have is left out where it asks for nothing.
        leads = [template.lead, template.bare_lead, template.trail]
        while leads and leads[-1] in (Template().lead, ""):
            leads.pop()
        moves_vectors = {
            "files": {
                name: file.sha256
                for name, file in sorted(self.files.items())
                if (name.endswith(".safetensors") and name != CALIBRATION_FILE) or name == TOKENIZER_FILE
            },
            "config": vector_settings(config),
            "attention": self.attention,
            "template": [template.prefix, template.suffix, template.strip, *leads],
            "pooling": self.pooling,
            "skip_instruction": self.skip_instruction,
            **({} if self.span_count == "text" else {"span_count": self.span_count}),
        }
        return self.model_copy(update={"embedding_space": _digest(moves_vectors)[:16]})

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, with a hash over itself so that an edit by hand shows."""
        content = self.model_dump(mode="json")
        document = {**content, "manifest_sha256": _digest(content)}
        (folder / MANIFEST_FILE).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def quantized_space(embedding_space: str, kind: str) -> str:
    """The embedding-space id of vectors from quantized weights, which must not be mixed with the others."""
    return embedding_space if kind == "none" else f"{embedding_space}-{kind}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a stored encoder.

    Raises:
        StoreError: if the manifest is missing, can't be read, or was changed after it was written.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise StoreError(
            f"{folder} is not a stored encoder: it has no {MANIFEST_FILE}. "
            f"Make one with: llm2vec-service build --base REF --out DIR"
        )
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        claimed = document.pop("manifest_sha256", None)
        if document.get("format") not in _READ:
            raise StoreError(
                f"{path} has format {document.get('format')}, this version reads 1 to {FORMAT}: build the encoder again"
            )
        manifest = Manifest.model_validate(document)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if claimed != _digest(document):
        raise StoreError(f"{path} was changed after it was written: build the encoder again")
    return manifest


def find_built(folder: Path, recipe: Recipe) -> Manifest | None:
    """The manifest in `folder` if it is the recipe's encoder, complete and unchanged. It reads every byte to check."""
    try:
        manifest = read_manifest(folder)
    except StoreError:
        return None
    whole = manifest.recipe_fingerprint == recipe.fingerprint and not changed_files(folder, manifest)
    return manifest if whole and not any(source.changed for source in (manifest.base, *manifest.adapters)) else None


def _content_of(reference: str) -> str:
    """The sha256 of the files directly in a folder that libraries read; "" if there is no such folder."""
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        return ""
    return _digest({name: file.sha256 for name, file in describe_files(folder).items() if name.endswith(_READ_FILES)})


def describe_files(folder: Path) -> dict[str, StoredFile]:
    """Size and sha256 of every file in the folder but the manifest."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE and path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(file_sha256, paths)
    return {
        path.name: StoredFile(size=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, hashes, strict=True)
    }


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """The differences between the folder and its manifest, a sentence each; empty if the folder is complete.

    It reads every byte of the folder, several files at once.
    """
    present = {path.name for path in folder.iterdir() if path.name.endswith(_READ_FILES)} - {MANIFEST_FILE}
    differences = [f"{name}: not part of this encoder" for name in sorted(present - manifest.files.keys())]
    names = sorted(manifest.files)
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(_difference, folder), names, [manifest.files[name] for name in names])
    return differences + [difference for difference in found if difference]


def _difference(folder: Path, name: str, stored: StoredFile) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name}: missing"
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        return f"{name}: a link that leads out of the folder"
    size = path.stat().st_size
    if size != stored.size:
        return f"{name}: {size} bytes, should be {stored.size}"
    if file_sha256(path) != stored.sha256:
        return f"{name}: content changed (sha256 differs)"
    return None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
