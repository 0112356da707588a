"""Settings → an encoder and everything that serves it. This module starts nothing and knows no HTTP.

Engine processes and `embed` use it without FastAPI or uvicorn.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

from model_store.manifest import Manifest, changed_files, find_built, quantized_space, read_manifest
from model_store.recipe import load_recipe
from model_store.text.tokenizer import TextTokenizer
from service.batching.limits import Limits
from service.device.backend import LocalBackend
from service.device.torch_environment import set_torch_defaults
from service.embedding.backend import Served
from service.errors import StartupError
from service.logs import configure_logs
from service.metrics import Metrics
from service.settings import Settings

Progress = Callable[[int, int], None]


def prepare(settings: Settings, progress: Progress) -> Served:
    """Find or build the encoder of these settings, and make the parts that serve it.

    Raises:
        StartupError, UserError: with a sentence that says what to change.
    """
    set_torch_defaults(settings.models_dir)
    from model_store.encoder.devices import choose_device  # torch, from here on
    from service.device.worker import EncoderWorker, leave_cores_to_device_thread

    leave_cores_to_device_thread()
    device = choose_device(settings.device)
    folder, manifest = prepare_store(settings, progress)
    manifest = as_served(manifest, settings)
    configure_logs(settings.log_level)
    limits = Limits(settings, manifest, device.type)
    metrics = Metrics()
    tokenizer = load_tokenizer(folder, manifest, settings)
    backend = LocalBackend(EncoderWorker(folder, settings, metrics), settings, manifest, limits, metrics)
    return Served(settings, manifest, tokenizer, limits, backend, metrics)


def as_served(manifest: Manifest, settings: Settings) -> Manifest:
    """The manifest with the embedding space of the vectors that these settings give."""
    space = quantized_space(manifest.embedding_space, settings.quantization)
    return manifest.model_copy(update={"embedding_space": space})


def load_tokenizer(folder: Path, manifest: Manifest, settings: Settings) -> TextTokenizer:
    """The stored encoder's tokenizer. It cuts long texts if these settings say so."""
    return TextTokenizer.load(folder, manifest, reference=settings.truncation == "reference")


def settle() -> None:
    """Keep pauses of the interpreter short. To be called once everything that stays in memory is loaded.

    A full garbage collection looks at all objects, which takes a fifth of a second with torch loaded. So the present
    objects are frozen, and the few objects that requests make are collected sooner. The shorter switch interval lets a
    thread such as the event loop's run within a millisecond while a tokenizer's thread runs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)
    sys.setswitchinterval(0.001)


def prepare_store(settings: Settings, progress: Progress) -> tuple[Path, Manifest]:
    """The stored encoder to serve: the given folder, or the recipe's folder, which is built now if it is not complete.

    Raises:
        StartupError: if the encoder is damaged, or `model` is neither a folder nor a recipe.
    """
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        manifest = read_manifest(folder)
        if differences := changed_files(folder, manifest):
            raise StartupError(
                f"{folder} is damaged: {'; '.join(differences)}. "
                "Build it again, or copy it again from where it was built"
            )
        return folder, manifest
    recipe = load_recipe(settings.model)
    folder = settings.models_dir.expanduser() / recipe.name
    if built := find_built(folder, recipe):
        return folder, built

    from model_store.build.build import ensure_built  # torch is loaded only if there is something to build

    return folder, ensure_built(recipe, folder, progress)
