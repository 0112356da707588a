"""The folder that a job writes: numbered shards, the rows left out, and the manifest that says what of it counts.

A shard is written under another name, synced and renamed, and counts once the manifest has it, which is replaced in the
same way. So what the manifest says is true whenever the job ends, be it by a kill or for want of power, and what it
does not say goes when the job goes on. One job at a time has the folder.
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
    """The folder, while this process alone has it. `manifest` is what counts of it; None before a job has begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)

    @classmethod
    @contextmanager
    def alone(cls, path: Path) -> Iterator[JobFolder]:
        """The folder, made if it is not there.

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
            os.close(descriptor)  # which ends the lock, as the end of the process does

    def begin(self, job: Job, overwrite: bool = False) -> Manifest:
        """Begin a job, or go on with it where it was left; what is done of it.

        Raises:
            JobError: if the folder holds what no job wrote, or another job's output that is not to be overwritten.
        """
        manifest = self.manifest
        if manifest is None:
            if found := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
                raise JobError(
                    f"{self.path} is not empty ({found[0]}) and has no {MANIFEST_FILE}: choose another --out"
                )
            return self._save(Manifest(job=job))
        if overwrite:
            # Killed in the midst of it, the old job is one that has done nothing yet.
            self._keep_only(self._save(Manifest(job=manifest.job)))
            return self._save(Manifest(job=job))
        if differences := manifest.job.differences(job):
            raise JobError(
                f"{self.path} was begun with {'; '.join(differences)}: put that back to go on, choose another --out, "
                "or begin anew with --overwrite"
            )
        written = {shard.file: shard.bytes for shard in manifest.shards}
        found_bytes = {name: _size(self.path / name) for name in written}
        if lost := [name for name, size in written.items() if found_bytes[name] != size]:
            raise JobError(f"{self.path / lost[0]} is not as it was written: begin anew with --overwrite")
        if max(_size(self.path / ERRORS_FILE), 0) < manifest.errors_bytes:
            raise JobError(f"{self.path / ERRORS_FILE} is not as it was written: begin anew with --overwrite")
        self._keep_only(manifest)
        return manifest

    def add(self, rows: ShardRows, errors: Sequence[Mapping[str, Any]], writer: ShardWriter) -> Manifest:
        """Write a shard and what was left out of it, and have them count.

        Raises:
            OSError: if they can't be written; then they don't count.
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
            first_row=manifest.read,
            read=rows.read,
            tokens=rows.tokens,
            input=rows.input,
            line=rows.line,
        )
        done = {
            "shards": (*manifest.shards, shard),
            "errors": manifest.errors + len(errors),
            "errors_bytes": self._append_errors(manifest.errors_bytes, errors),
        }
        return self._save(manifest.model_copy(update=done))

    def finish(self) -> Manifest:
        """Say that the job is done."""
        assert self.manifest is not None, "begin comes first"
        return self._save(self.manifest.model_copy(update={"complete": True}))

    def _save(self, manifest: Manifest) -> Manifest:
        text = manifest.model_dump_json(indent=1) + "\n"
        self._write(MANIFEST_FILE, lambda path: path.write_text(text))
        self.manifest = manifest
        return manifest

    def _write(self, name: str, fill: Callable[[Path], object]) -> None:
        """A file that is there whole, with all that was written before it, or not at all."""
        partial = self.path / f".{name}{_PARTIAL_SUFFIX}"
        fill(partial)
        _sync(partial)
        partial.replace(self.path / name)
        _sync(self.path)

    def _append_errors(self, count_bytes: int, errors: Sequence[Mapping[str, Any]]) -> int:
        """Put these behind what counts of the list, and nothing else; how long it is then."""
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
        """Remove what a job has written that does not count. Files of others stay."""
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
    """Its bytes; -1 where there is no file."""
    return path.stat().st_size if path.is_file() else -1


def _sync(path: Path) -> None:
    """Have what was written to a file, or which files are in a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
