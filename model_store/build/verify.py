"""Checks that a stored encoder is whole, and still computes the vectors that it computed when it was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from model_store.build.checkpoints import decoder_on_meta, open_checkpoint
from model_store.build.self_test import self_test_difference
from model_store.errors import UserError
from model_store.manifest import FORMAT, Manifest, StoreError, changed_files, read_manifest


@dataclass(frozen=True)
class Check:
    """One line of the report; `problems` is empty if all is well."""

    name: str
    found: str
    problems: tuple[str, ...] = ()


def verify_encoder(folder: Path) -> list[Check]:
    """Check manifest, files, tensors and self-test, in this order; a check that can't help any more is left out.

    Reads every byte of the folder and loads the model once.
    """
    try:
        manifest = read_manifest(folder)
    except StoreError as error:
        return [Check("manifest", "not usable", (str(error),))]
    changed = tuple(changed_files(folder, manifest))
    # The ids of earlier formats were made otherwise, and stay as they are.
    checked = manifest.format == FORMAT and not changed
    stale = checked and manifest.sealed(folder).embedding_space != manifest.embedding_space
    sealed = ("the embedding-space id does not belong to these files",) if stale else ()
    checks = [
        Check("manifest", f"{manifest.name}, embedding space {manifest.embedding_space}", sealed),
        Check("files", f"{len(manifest.files)} files", changed),
        _check_tensors(folder, manifest),
    ]
    if not any(check.problems for check in checks):
        checks.append(_check_self_test(folder))
    return checks


def _check_tensors(folder: Path, manifest: Manifest) -> Check:
    problems: list[str] = []
    count = 0
    try:
        checkpoint = open_checkpoint(folder)
        expected = {name: tensor.shape for name, tensor in decoder_on_meta(checkpoint.config).state_dict().items()}
        problems += [f"{name}: missing" for name in sorted(expected.keys() - checkpoint.names)]
        problems += [f"{name}: not a tensor of this model" for name in sorted(checkpoint.names - expected.keys())]
        for name in sorted(expected.keys() & checkpoint.names):
            tensor = checkpoint.tensor(name)
            count += 1
            if tensor.shape != expected[name]:
                problems.append(f"{name}: shape {tuple(tensor.shape)}, should be {tuple(expected[name])}")
            if str(tensor.dtype) != f"torch.{manifest.dtype}":
                problems.append(f"{name}: {tensor.dtype}, should be {manifest.dtype}")
            if not tensor.isfinite().all():
                problems.append(f"{name}: holds NaN or infinite values")
    except (UserError, SafetensorError, OSError) as error:
        problems.append(str(error))
    return Check("tensors", f"{count} tensors", tuple(problems))


def _check_self_test(folder: Path) -> Check:
    try:
        difference, allowed = self_test_difference(folder)
    except (UserError, SafetensorError) as error:
        return Check("self-test", "not usable", (str(error),))
    problems = () if difference <= allowed else (f"1 − cosine up to {difference:.1e}, allowed {allowed:.0e}",)
    return Check("self-test", f"1 − cosine up to {difference:.1e}", problems)
