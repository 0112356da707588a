"""Who imports whom: the rooms and the arrows between them, as a check. CONTRIBUTING.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each line may import what stands below it, and what stands beside it in the same pair of brackets only where BESIDE
# says so.
LEVELS: list[set[str]] = [
    {"service.__main__"},
    {"service.cli"},
    {"service.training_commands"},
    {"service.options"},
    {"service.bulk", "service.processes", "service.planning", "service.ray"},
    {"service.server"},
    {"service.api"},
    {"service.http", "service.device"},
    {"service.embedding"},
    {"service.batching"},
    {"service.metrics", "service.tracing"},
    {"service.settings"},
    {"service.logs"},
    {"service.errors", "service.version"},
    {"model_store.sentence_transformers_module"},
    {"model_store.training"},
    {"model_store.evaluation"},
    {"model_store.build"},
    {"model_store.encoder"},
    {"model_store.text"},
    {"model_store.manifest", "model_store.shape"},
    {"model_store.recipe"},
    {"model_store.templates", "model_store.rope", "model_store.json_text", "model_store.config_keys"},
    {"model_store.architectures", "model_store.pooling_modes", "model_store.tables"},
    {"model_store.errors"},
]
BESIDE = {("service.ray", "service.bulk")}

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 60

# A list of declarations, one a line, reads better whole.
LONG = {("metrics.py", "__init__")}

# Who may know these libraries; whoever else needs what they do asks one of these rooms.
LIBRARIES = {
    "fastapi": ("service.server", "service.api", "service.http"),
    "starlette": ("service.server", "service.api", "service.http"),
    "uvicorn": ("service.server", "service.http"),
    "torch": (
        "service.device",
        "model_store.encoder",
        "model_store.build",
        "model_store.training",
        "model_store.evaluation",
        "model_store.sentence_transformers_module",
    ),
    "ray": ("service.ray",),
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Names and files."""
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function; with what it takes from one, which may be one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, path
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """The folder, or the file, right below the package."""
    return ".".join(module.split(".")[:2])


LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
ALL = [*modules("service"), *modules("model_store")]


@pytest.mark.parametrize(("module", "path"), [(name, path) for name, path in ALL if "." in name])
def test_arrows_lead_down(module: str, path: Path) -> None:
    own = room(module)
    for target in {room(name) for name in imports(path) if name.split(".")[0] in ("service", "model_store")} - {own}:
        assert (own, target) in BESIDE or LEVEL_OF[target] > LEVEL_OF[own], f"{module} imports {target}"


def test_every_room_has_its_level() -> None:
    assert {room(name) for name, _ in ALL if "." in name} == set(LEVEL_OF)


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    knowing = {room(name) for name, path in ALL if any(one.split(".")[0] == library for one in imports(path))}
    assert knowing <= set(LIBRARIES[library])


@pytest.mark.parametrize("path", [path for _, path in ALL], ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION or (path.name, node.name) in LONG, node.name


def test_only_the_command_knows_that_there_may_be_several_processes() -> None:
    knowing = {room(name) for name, path in ALL if any(room(target) == "service.processes" for target in imports(path))}
    assert knowing - {"service.processes"} == {"service.cli"}


def test_policies_know_no_event_loop() -> None:
    for name in (
        "batching/scheduling",
        "batching/cost_model",
        "batching/memory_budget",
        "planning/simulation",
        "planning/plan",
        "processes/dispatch",
        "processes/wire",
    ):
        assert not {one for one in imports(ROOT / "service" / f"{name}.py") if one.startswith("asyncio")}, name


@pytest.mark.parametrize(
    "module",
    [
        "service.settings",
        "service.cli",
        "service.batching.batcher",
        "service.batching.limits",
        "service.embedding.embedder",
        "service.device.backend",
        "service.server.app",
        "service.server.process",
        "service.bulk.command",
        "service.bulk.client",
        "service.ray.ray_data",
        "service.planning.plan",
        "service.processes.child",
        "service.processes.devices",
        "service.processes.engine",
        "service.processes.frontend",
        "service.processes.remote",
        "service.processes.supervisor",
        "service.processes.wire",
        "model_store.manifest",
        "model_store.recipe",
        "model_store.shape",
        "model_store.pooling_modes",
        "model_store.text.tokenizer",
        "model_store.build.sources",
        "model_store.evaluation.command",
    ],
)
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "module", ["service.server.startup", "service.processes.engine", "service.bulk.command", "service.planning.plan"]
)
def test_only_what_answers_requests_loads_fastapi(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'fastapi', 'starlette', 'uvicorn'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_of_texts_need_neither_parquet_nor_ray() -> None:
    code = "import sys, service.cli, service.bulk.command; sys.exit(bool({'pyarrow', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_inits_are_empty() -> None:
    assert not [path for _, path in ALL if path.name == "__init__.py" and path.read_text()]


@pytest.mark.parametrize(("package", "other"), [("bench", "tests"), ("tests", "bench")])
def test_benches_and_tests_know_nothing_of_each_other(package: str, other: str) -> None:
    knowing = {name for name, path in modules(package) if any(one.split(".")[0] == other for one in imports(path))}
    assert not knowing
