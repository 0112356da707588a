"""`llm2vec-service embed`: files of texts in, a folder of vectors out. An interrupted job can be continued."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from service.bulk.folder import ERRORS_FILE, JobFolder
from service.bulk.job import Asked, Job, JobError, Manifest, describe
from service.bulk.pipeline import Embeds, OnDone, reason_of, run
from service.bulk.reading import PATH_COLUMN, Columns, find_inputs
from service.bulk.shards import check_format
from service.bulk.sources import LocalVectors, ServerVectors, Wanted, warn_of_another_width
from service.errors import InvalidRequest
from service.logs import configure_logs
from service.settings import load_settings

Progress = Callable[[int, int], None]

# How often the bar moves if it is written as lines of a log.
_LOG_SECONDS = 10.0


def embed(asked: Asked, progress: Progress) -> Manifest:
    """Do a job, or the rest of it. `progress` is told when an encoder is built. Returns the final manifest.

    Raises:
        UserError, ServiceError, OSError: with a sentence that says what to change. The finished
            shards stay, and the same command goes on from there.
    """
    _refuse_contradictions(asked)
    check_format(asked.format)
    inputs = find_inputs(asked.inputs, asked.input_format)
    path_column = PATH_COLUMN if all(one.kind == "files" for one in inputs) else None
    columns = Columns(asked.text_column, asked.id_column or path_column, tuple(asked.carry))
    with JobFolder.alone(asked.out) as folder:
        before = folder.manifest
        records = describe(inputs, columns, asked.on_error, before.job.inputs if before else ())
        vectors = _vectors(asked, progress)
        source = vectors.source
        job = Job(
            source=source,
            instruction=vectors.instruction,
            dimensions=asked.dimensions or source.width,
            overflow=asked.overflow,
            embed_dtype=asked.embed_dtype,
            text_column=columns.text,
            id_column=columns.id,
            carried=columns.carried,
            file_format=asked.format,
            rows_per_shard=asked.rows_per_shard,
            inputs=records,
        )
        if not 1 <= job.dimensions <= source.width:
            raise JobError(f"--dimensions is {job.dimensions}: {source.model} has 1 to {source.width}")
        manifest = folder.begin(job, asked.overwrite)
        if manifest.complete:
            print(f"{asked.out} has it already, whole: {_summary(manifest)}")
            return manifest

        async def work() -> None:
            async with vectors.running():
                await _try_out(vectors)  # finds errors of the options before any text is blamed for them
                warn_of_another_width(source, job.dimensions)
                with _bar(job.rows, manifest.read) as on_done:
                    await run(job, inputs, folder, vectors, asked.on_error, on_done)

        asyncio.run(work())
        assert folder.manifest is not None
        print(f"{asked.out}: {_summary(folder.manifest)}")
        return folder.manifest


def _refuse_contradictions(asked: Asked) -> None:
    if asked.instruction is not None and asked.input_type:
        raise JobError("--instruction and --input-type both say what stands before each text: give one of them")
    if asked.url and (given := [name for name in ("model", "device", "dtype") if getattr(asked, name)]):
        raise JobError(f"--{given[0]} is the server's own choice: leave it out, or leave out --url")
    for name in ("rows_per_shard", "concurrency"):
        if getattr(asked, name) < 1:
            raise JobError(f"--{name.replace('_', '-')} is {getattr(asked, name)}: at least 1")
    out = asked.out.resolve()
    if inside := [path for path in asked.inputs if out.is_relative_to(path.resolve())]:
        raise JobError(f"{asked.out} is in {inside[0]}, whose files are to be embedded: choose another --out")


def _vectors(asked: Asked, progress: Progress) -> LocalVectors | ServerVectors:
    wanted = Wanted(asked.instruction, asked.input_type, asked.dimensions or 0, asked.overflow)
    if asked.url:
        configure_logs("warning")
        return asyncio.run(ServerVectors.reach(asked.url, wanted, asked.concurrency))
    given = {name: value for name in ("model", "device", "dtype") if (value := getattr(asked, name)) is not None}
    settings = load_settings(given)
    if "log_level" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_level": "warning"})  # info lines are for a server's log
    return LocalVectors.prepare(settings, wanted, progress)


async def _try_out(vectors: Embeds) -> None:
    try:
        await vectors.embed(["a"])
    except InvalidRequest as error:
        raise JobError(f"no text can be embedded so: {reason_of(error)}") from error


def _summary(manifest: Manifest) -> str:
    left_out = f", {manifest.errors} left out (see {ERRORS_FILE})" if manifest.errors else ""
    return f"{manifest.rows} rows in {len(manifest.shards)} files{left_out}"


@contextmanager
def _bar(rows: int, done: int) -> Iterator[OnDone]:
    """Shows rows done and this run's tokens a second; as lines of a log if stderr is no terminal."""
    quiet = not sys.stderr.isatty()
    began, all_tokens = time.perf_counter(), 0
    with tqdm(
        total=rows,
        initial=done,
        desc="embedding",
        unit="row",
        unit_scale=True,
        mininterval=_LOG_SECONDS if quiet else 0.1,
        ascii=quiet,
    ) as bar:

        def on_done(more: int, tokens: int) -> None:
            nonlocal all_tokens
            all_tokens += tokens
            bar.set_postfix_str(f"{all_tokens / (time.perf_counter() - began):.0f} tokens/s", refresh=False)
            bar.update(more)

        yield on_done
