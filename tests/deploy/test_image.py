"""The Dockerfile's choice of torch: its arguments, its check, and the CUDA releases that the documents name."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.monitoring import ROOT
from tests.deploy.test_compose import BASE, load

DOCKERFILE = (ROOT / "Dockerfile").read_text()
CONSTRAINTS = ROOT / "constraints.txt"
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
CHECK = ROOT / "docker" / "check_torch.py"

# The CUDA release of PyPI's wheel for Linux by torch's version, as of November 2026, and each family's least driver.
PYPI_CUDA = {"2.10.0": "12.8", "2.11.0": "13.0", "2.12.1": "13.0", "2.13.0": "13.0", "2.14.1": "13.0", "2.15.0": "13.2"}
LEAST_DRIVER = {"12": "R525", "13": "R580"}

TORCH = re.findall(r"^torch==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)[0]


def arguments(text: str) -> dict[str, str]:
    """The build arguments that a Dockerfile declares, with their defaults."""
    return {name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE)}


def table() -> list[list[str]]:
    """The rows of the document's table of drivers: GPUs, driver, CUDA, build arguments."""
    section = DEPLOYMENT.partition("## GPUs and drivers")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def named_arguments(row: list[str]) -> dict[str, str]:
    """The build arguments in a row's last cell."""
    return dict(re.findall(r"`(\w+)=([^`]+)`", row[-1]))


def after_version(version: str, folder: Path) -> str:
    """constraints.txt as the Dockerfile's own command leaves it."""
    (command,) = re.findall(r"^RUN (if \[ -n \"\$TORCH_VERSION\" \]; .*)$", DOCKERFILE, re.MULTILINE)
    (folder / "constraints.txt").write_text(CONSTRAINTS.read_text())
    subprocess.run(["sh", "-ec", command], cwd=folder, env={**os.environ, "TORCH_VERSION": version}, check=True)
    return (folder / "constraints.txt").read_text()


def check(device: str, version: str, cuda: str | None) -> str:
    found: str = runpy.run_path(str(CHECK))["problem"](device, version, cuda)
    return found


def test_an_image_for_a_gpu_needs_a_torch_with_cuda() -> None:
    assert check("cuda", "2.13.0+cu130", "13.0") == ""
    refused = check("cuda", "2.13.0+cpu", None)
    for way_out in ("docker/wheels", "TORCH_INDEX", "--build-arg DEVICE=cpu"):
        assert way_out in refused
    assert check("cpu", "2.13.0+cpu", None) == check("cpu", "2.13.0", "13.0") == ""
    assert "'gpu'" in check("gpu", "2.13.0", "13.0")


def test_the_build_runs_the_check_and_its_way_out_exists() -> None:
    assert '/opt/venv/bin/python3 -W ignore docker/check_torch.py "$DEVICE"' in DOCKERFILE
    assert "!docker/check_torch.py" in (ROOT / ".dockerignore").read_text().splitlines()
    assert arguments(DOCKERFILE)["DEVICE"] == "cuda"
    assert load("docker/compose.cpu.yml")["llm2vec"]["build"]["args"]["DEVICE"] == "cpu"
    assert "--build-arg DEVICE=cpu" in (ROOT / "docker" / "container-test.sh").read_text()


def test_the_check_ends_as_it_reports() -> None:
    import torch

    done = subprocess.run([sys.executable, CHECK, "cuda"], capture_output=True, text=True)
    assert done.returncode == (0 if torch.version.cuda else 1)
    assert torch.__version__ in done.stdout
    assert subprocess.run([sys.executable, CHECK, "cpu"], capture_output=True).returncode == 0


@pytest.mark.parametrize("version", ["", "2.11.0"])
def test_another_torch_replaces_the_pin_and_keeps_the_others(version: str, tmp_path: Path) -> None:
    before, after = CONSTRAINTS.read_text().splitlines(), after_version(version, tmp_path).splitlines()
    changed = {f"torch=={TORCH}"} | {line for line in before if line.startswith("setuptools==")}
    assert set(before) - set(after) == (changed if version else set())
    assert set(after) - set(before) == ({f"torch=={version}"} if version else set())


def test_the_default_is_what_the_pinned_torch_is_built_for() -> None:
    (default,) = [row for row in table() if not named_arguments(row)]
    cuda = PYPI_CUDA[TORCH]
    assert default[1:3] == [f"{LEAST_DRIVER[cuda.partition('.')[0]]} or later", cuda]
    assert f"torch {TORCH} " in DEPLOYMENT
    assert not re.search(r"cuda[:-]\d|\bcu\d{3}\b", DOCKERFILE, re.IGNORECASE), (
        "torch names the release, no line of this"
    )
    assert f"/nvidia/cu{cuda.partition('.')[0]} " in DOCKERFILE


def test_the_other_rows_name_the_release_that_their_index_holds() -> None:
    others = [row for row in table() if named_arguments(row)]
    assert len(others) >= 2
    for row in others:
        index = named_arguments(row)["TORCH_INDEX"]
        assert index == f"https://download.pytorch.org/whl/cu{row[2].replace('.', '')}"
        assert re.fullmatch(r"R\d+ or later", row[1])
        assert row[1] >= LEAST_DRIVER[row[2].partition(".")[0]]


def test_each_argument_of_the_documents_exists_and_compose_passes_it() -> None:
    declared = arguments(DOCKERFILE)
    assert {name for row in table() for name in named_arguments(row)} == {"TORCH_INDEX", "TORCH_VERSION"}
    assert set(re.findall(r"--build-arg (\w+)", DEPLOYMENT)) <= set(declared)
    example = (ROOT / ".env.example").read_text()
    for file, names in (
        (BASE, {"TORCH_INDEX", "TORCH_VERSION"}),
        ("docker/compose.flash-attn.yml", {"FLASH_ATTN_CUDA_ARCHS", "MAX_JOBS"}),
    ):
        passed = load(file)["llm2vec"]["build"]["args"]
        assert passed == {name: f"${{{name}:-{declared[name]}}}" for name in names}
        assert all(re.search(rf"^#{name}=", example, re.MULTILINE) for name in names)
