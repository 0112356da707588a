"""Who imports whom: the borders between the packages, as a check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function."""
    return set(re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE))


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_model_store_knows_nothing_of_the_service() -> None:
    assert not [path for path in files("model_store") if any(name.startswith("service") for name in imports(path))]


def test_fastapi_is_only_in_app_and_api() -> None:
    allowed = {ROOT / "service" / "app.py", *files("service/api")}
    used = {
        path
        for path in files("service") + files("model_store")
        if any(name.split(".")[0] in ("fastapi", "starlette") for name in imports(path))
    }
    assert used <= allowed


def test_only_the_command_knows_that_there_may_be_several_processes() -> None:
    others = set(files("service")) - set(files("service/processes"))
    knowing = {path for path in others if any(name.startswith("service.processes") for name in imports(path))}
    assert knowing == {ROOT / "service" / "cli.py"}


def test_policies_know_no_event_loop() -> None:
    for name in ("scheduling", "cost_model", "simulation", "planning", "processes/dispatch", "processes/wire"):
        assert "asyncio" not in imports(ROOT / "service" / f"{name}.py"), name


def test_errors_know_nothing() -> None:
    assert imports(ROOT / "service" / "errors.py") == {"__future__", "typing"}


@pytest.mark.parametrize(
    "module",
    [
        "service.app",
        "service.backend",
        "service.batcher",
        "service.bulk.command",
        "service.bulk.ray_data",
        "service.processes.child",
        "service.processes.devices",
        "service.processes.engine",
        "service.processes.frontend",
        "service.processes.remote",
        "service.processes.supervisor",
        "service.processes.wire",
        "service.embedder",
        "service.settings",
        "service.cli",
        "service.planning",
        "service.client",
        "model_store.evaluation.command",
        "model_store.manifest",
        "model_store.recipe",
        "model_store.shape",
        "model_store.tokenizer",
        "model_store.pooling_modes",
        "model_store.sources",
    ],
)
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_of_texts_need_neither_parquet_nor_ray() -> None:
    code = "import sys, service.cli, service.bulk.command; sys.exit(bool({'pyarrow', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_inits_are_empty() -> None:
    assert not [
        path for path in files("service") + files("model_store") if path.name == "__init__.py" and path.read_text()
    ]
