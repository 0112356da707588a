"""The site builds without a warning and loads nothing from elsewhere; what pages show is what commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.metrics import Metrics
from tests.documented import PAGE, run_again
from tests.test_arrows import BESIDE, LEVELS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("furo", reason="the site is made by the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(folder / "doctrees"), "docs", str(folder / "site")]
    built = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "site"


def test_every_page_is_there_and_what_the_readme_links_to(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page
    index = (site / "index.html").read_text()
    for page in re.findall(r"\]\(\s*docs/([\w-]+)\.md", (ROOT / "README.md").read_text()):
        assert f'href="{page}.html"' in index, page


def test_the_settings_and_every_operation_are_there(site: Path) -> None:
    configuration, index = (site / "configuration.html").read_text(), (site / "index.html").read_text()
    assert "LLM2VEC_TOKEN_BUDGET" in configuration
    assert "LLM2VEC_TOKEN_BUDGET" not in index
    reference = (site / "reference.html").read_text()
    for operation in ("POST /v1/embeddings", "POST /v1/chunk_embeddings", "POST /v2/embed", "GET /readyz"):
        assert operation in re.sub("<[^>]+>", "", reference)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = []
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            loaded += re.findall(r"""(?:src|href)=["']((?:https?:)?//[^"']+)""", tag)
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)""", sheet.read_text())
    assert not loaded


def test_the_operations_page_names_series_that_there_are() -> None:
    series = {family.name for family in Metrics().registry.collect()}
    named = set(re.findall(r"llm2vec_\w+", (ROOT / "docs" / "operations.md").read_text()))
    assert {name.removesuffix("_total") for name in named} <= series


def test_the_capacity_page_shows_what_its_commands_print() -> None:
    page = PAGE.read_text()
    assert page.count("$ llm2vec-service plan") >= 6
    assert run_again(page) == page, "python -m tests.documented brings it up to date"


def test_the_capacity_page_shows_the_simulation_that_is_kept() -> None:
    command = [sys.executable, "-m", "bench.simulate", "--table"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table.count("\n") >= 8
    assert table in PAGE.read_text()


def test_contributing_draws_the_arrows_that_are_checked() -> None:
    (drawn,) = re.findall(r"^```\n(service\.__main__\n.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert [set(re.findall(r"(?<!→ )\b(?:service|model_store)\.\w+", line)) for line in drawn.splitlines()] == LEVELS
    assert set(re.findall(r"(\S+) \(→ (\S+)\)", drawn)) == BESIDE
