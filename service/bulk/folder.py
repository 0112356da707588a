"""The folder that a job writes: numbered shards, the rows left out, and the manifest that says which files count.

A shard is written under another name, synced and renamed. It counts once the manifest lists it, and the manifest is
replaced in the same way. So the manifest is true whenever the job ends, even by a kill or a loss of power. Files that
it does not list are removed when the job goes on. Only one job at a time has the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model_store.manifest import MANIFEST_FILE, file_sha256
from service.bulk.job import Job, JobError, Manifest, Shard
from service.bulk.shards import BESIDE_SUFFIX, ShardRows, ShardWriter

ERRORS_FILE = "errors.jsonl"

_PARTIAL_SUFFIX = ".partial"


class JobFolder:
    """The folder, while this process alone has it. `manifest` is None before a job has begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)

    @classmethod
    @contextmanager
    def alone(cls, path: Path) -> Iterator[JobFolder]:
        """The folder, made if it does not exist, and locked for this process.

        Raises:
            JobError: if another process has it, or its manifest can't be read.
        """
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JobError(f"another job is writing to {path}: wait for it, or choose another --out") from error
            yield cls(path)
        finally:
            os.close(descriptor)  # this ends the lock, as the end of the process also does

    def begin(self, job: Job, overwrite: bool = False) -> Manifest:
        """Begin a job, or go on with it. Returns the manifest of the work that is done.

        Raises:
            JobError: if the folder holds files that no job wrote, or another job's output without `overwrite`.
        """
        manifest = self.manifest
        if manifest is None:
            if found := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
                raise JobError(
                    f"{self.path} is not empty ({found[0]}) and has no {MANIFEST_FILE}: choose another --out"
                )
            return self._save(Manifest(job=job))
        if overwrite:
            # First empty the old job: after a kill between the two steps, it is a job that has done nothing yet.
            self._keep_only(self._save(Manifest(job=manifest.job)))
            return self._save(Manifest(job=job))
        if differences := manifest.job.differences(job):
            raise JobError(
                f"{self.path} was begun with {'; '.join(differences)}: put that back to go on, choose another --out, "
                "or begin anew with --overwrite"
            )
        changed = [shard.file for shard in manifest.shards if _size(self.path / shard.file) != shard.bytes]
        if _size(self.path / ERRORS_FILE) < manifest.errors_bytes:
            changed.append(ERRORS_FILE)
        if changed:
            raise JobError(f"{self.path / changed[0]} is not as it was written: begin anew with --overwrite")
        self._keep_only(manifest)
        return manifest

    def add(self, rows: ShardRows, writer: ShardWriter) -> Manifest:
        """Write a shard and the rows that were left out of it, and list both in the manifest.

        Raises:
            OSError: if they can't be written; the manifest then stays as it was.
        """
        manifest = self.manifest
        assert manifest is not None, "begin comes first"
        name = f"part-{len(manifest.shards):05}"
        writer.save(rows, lambda suffix, fill: self._write(name + suffix, fill))
        path = self.path / f"{name}.{manifest.job.file_format}"
        shard = Shard(
            file=path.name,
            rows=len(rows.numbers),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            first_row=rows.first_row,
            read=rows.read,
            tokens=rows.tokens,
            input=rows.input,
            line=rows.line,
        )
        done = {
            "shards": (*manifest.shards, shard),
            "errors": manifest.errors + len(rows.errors),
            "errors_bytes": self._append_errors(manifest.errors_bytes, rows.errors),
        }
        return self._save(manifest.model_copy(update=done))

    def finish(self) -> Manifest:
        assert self.manifest is not None, "begin comes first"
        return self._save(self.manifest.model_copy(update={"complete": True}))

    def _save(self, manifest: Manifest) -> Manifest:
        text = manifest.model_dump_json(indent=1) + "\n"
        self._write(MANIFEST_FILE, lambda path: path.write_text(text))
        self.manifest = manifest
        return manifest

    def _write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Write a file so that it exists whole, after everything written before it, or not at all."""
        partial = self.path / f".{name}{_PARTIAL_SUFFIX}"
        fill(partial)
        _sync(partial)
        partial.replace(self.path / name)
        _sync(self.path)

    def _append_errors(self, count_bytes: int, errors: Sequence[Mapping[str, Any]]) -> int:
        """Append these errors to the first `count_bytes` of the list and cut the rest. Returns the new length."""
        path = self.path / ERRORS_FILE
        if not errors and not path.exists():
            return count_bytes
        with path.open("ab") as file:
            file.truncate(count_bytes)
            for error in errors:
                file.write(json.dumps(error).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _keep_only(self, manifest: Manifest) -> None:
        """Remove a job's files that this manifest does not list. Other files stay."""
        stems = {Path(shard.file).stem for shard in manifest.shards}
        for path in self.path.iterdir():
            shard = path.name.startswith("part-") and path.suffix in (".parquet", ".safetensors", BESIDE_SUFFIX)
            if path.name.endswith(_PARTIAL_SUFFIX) or (shard and path.stem not in stems):
                path.unlink()
        self._append_errors(manifest.errors_bytes, ())


def _read_manifest(folder: Path) -> Manifest | None:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise JobError(
            f"{path} is not the manifest of such a job ({error.errors()[0]['msg']}): choose another --out"
        ) from error


def _size(path: Path) -> int:
    """The file's size in bytes; 0 if there is no file."""
    return path.stat().st_size if path.is_file() else 0


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of files, to the disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
