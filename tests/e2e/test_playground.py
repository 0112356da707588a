"""The playground in a browser, against live servers: Debian's Chromium, driven by Playwright.

It skips where there is no Chromium (`make programs` installs it) or no Playwright. The views are tried with a tiny
encoder, whose numbers are not the point: they have to be those that the API gives.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from examples.query_document import DOCUMENTS, QUERIES
from tests.e2e.process import ServerProcess
from tests.npm import npm_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `clients`")

pytestmark = pytest.mark.timeout(300)

AXE = "axe-core@4.14.1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
SETTINGS = {"LLM2VEC_QUERY_INSTRUCTION": INSTRUCTION}
VIEWS = ("similarity", "tokens", "map", "server", "code")
KEY, METRICS_KEY = "sk-one-1234567890", "sk-two-0987654321"

# Every wait of the browser for something to be so.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: `make programs` installs it")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(encoder, SETTINGS, "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def locked(encoder: Path) -> Iterator[ServerProcess]:
    keys = {"LLM2VEC_API_KEYS": KEY, "LLM2VEC_METRICS_KEY": METRICS_KEY}
    with ServerProcess(encoder, {**SETTINGS, **keys}, "--dtype", "float32") as running:
        yield running


class Tab:
    """A page of the browser, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.url = url
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def _hear(self, said: Any) -> None:
        if said.type == "error":
            self.wrong.append(said.text)

    def open(self, path: str = "/") -> Any:
        """The page with the example's results."""
        self.page.goto(self.url + path)
        self.page.wait_for_selector("text=on the device")
        return self.page

    def embed(self, **fields: str) -> Any:
        """The page with the results of what is filled in."""
        for name, value in fields.items():
            self.page.fill(f"#{name.replace('_', '-')}", value)
        with self.page.expect_response(lambda answer: "/v1/embeddings" in answer.url):
            self.page.keyboard.press("Control+Enter")
        self.page.wait_for_selector("#results[aria-busy=false]")
        return self.page


@pytest.fixture
def tab(browser: Any, server: ServerProcess) -> Iterator[Tab]:
    with Tab(browser, server.base_url) as one:
        yield one
        assert one.wrong == []
        assert {httpx.URL(url).netloc for url in one.asked} == {httpx.URL(server.base_url).netloc}


def values(page: Any) -> NDArray[np.float64]:
    """The numbers in the matrix."""
    rows = page.locator("table.matrix tbody tr").all()
    return np.array([[float(cell.get_attribute("value")) for cell in row.locator("data").all()] for row in rows])


def vectors(server: ServerProcess, texts: list[str], **fields: Any) -> NDArray[np.float64]:
    answer = server.embed(texts, **fields)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


def cosines(server: ServerProcess, **fields: Any) -> NDArray[np.float64]:
    matrix: NDArray[np.float64] = vectors(server, QUERIES, **fields) @ vectors(server, DOCUMENTS).T
    return matrix


def test_the_example_gives_the_numbers_that_the_api_gives(tab: Tab, server: ServerProcess) -> None:
    page = tab.open()
    given = [page.input_value(f"#{name}").split("\n") for name in ("queries", "documents")]
    assert [[line for line in lines if line] for lines in given] == [QUERIES, DOCUMENTS]
    assert page.input_value("#instruction") == INSTRUCTION
    with_it, without = cosines(server, instruction=INSTRUCTION), cosines(server)
    assert np.abs(with_it - without).max() > 1e-3
    shown = page.locator("table.matrix data").all_inner_texts()
    np.testing.assert_allclose(values(page), with_it, atol=1e-5)
    assert shown == [f"{value:.3f}".replace("-", "−") for value in values(page).ravel()]
    page.check("input[value=without]")
    np.testing.assert_allclose(values(page), without, atol=1e-5)
    page.check("input[value=change]")
    np.testing.assert_allclose(values(page), with_it - without, atol=1e-5)
    assert all(text[0] in "+−" for text in page.locator("table.matrix data").all_inner_texts())
    for query, row in enumerate(with_it):
        ranked = page.locator(".ranking").nth(query).locator("li")
        assert ranked.locator(".label").all_inner_texts() == [f"D{place + 1}" for place in np.argsort(-row)]
    assert page.inner_text("#model") == "tiny"


def test_tokens_say_what_they_are_of(tab: Tab, server: ServerProcess) -> None:
    page = tab.open("/#tokens")
    page.wait_for_selector(".token-row")
    said = page.locator(".token-row").first.inner_text().replace("\n", "")
    row = server_preview(server, QUERIES[0], instruction=INSTRUCTION)
    assert f"{row['token_count']} tokens · {row['pooled_count']} pooled" in said

    def drawn(kind: str) -> str:
        chips = page.locator(f".token-row:first-of-type .token.{kind}").evaluate_all(
            "chips => chips.map((chip) => chip.firstChild.data)"
        )
        return "".join(chips).replace("·", " ").strip()

    assert drawn("special") == "<bos>"
    assert drawn("instruction") == INSTRUCTION
    assert drawn("text.pooled") == QUERIES[0]
    assert "instruction, not pooled:" in page.locator(".token-row").first.text_content()
    page.check("text=Token ids")
    assert page.locator(".token small").first.inner_text() == str(row["tokens"][0]["id"])


def server_preview(server: ServerProcess, text: str, **fields: Any) -> dict[str, Any]:
    body = {"input": text, **fields}
    row: dict[str, Any] = httpx.post(f"{server.base_url}/v1/prompts/preview", json=body, timeout=60).json()["data"][0]
    return row


def test_a_long_text_shows_its_cut(tab: Tab, server: ServerProcess) -> None:
    page = tab.open()
    long = "the river ran past the mill and the valley " * 80
    tab.embed(queries="a river", documents=f"{long}\na flute")
    assert "Not all of it was read" in page.inner_text("#status")
    row = server_preview(server, long.strip(), truncate="END")
    page.click("#tab-tokens")
    page.wait_for_selector(".token.cut >> nth=9")
    said = page.locator(".token-row").nth(1).inner_text()
    assert f"{row['token_count']} tokens · {row['pooled_count']} pooled · {row['cut_count']} cut" in said
    assert " cut" not in page.inner_text(".token-row >> nth=2")
    folded = page.locator(".token-row").nth(1).locator(".fold")
    while folded.count():
        folded.first.click()
    assert page.locator(".token-row").nth(1).locator(".token.cut").count() == row["cut_count"]
    page.click("text=More")
    page.select_option("#too-long", "error")
    page.wait_for_selector("text=more than the 512 that are read")
    with page.expect_response(lambda answer: answer.status == 400):
        page.keyboard.press("Control+Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "maximum context length is 512 tokens" in page.inner_text("#error")
    assert "That is D1" in page.inner_text("#error")
    page.select_option("#too-long", "mean")
    tab.embed()
    assert page.is_hidden("#error")
    page.click("#tab-similarity")
    np.testing.assert_allclose(values(page)[0, 0], of_the_mean(server, long.strip()), atol=1e-5)
    tab.wrong.remove("Failed to load resource: the server responded with a status of 400 (Bad Request)")


def of_the_mean(server: ServerProcess, text: str) -> float:
    query = vectors(server, ["a river"], instruction=INSTRUCTION)[0]
    return float(query @ vectors(server, [text], overflow="mean")[0])


def test_a_wrong_key_shows_the_message(browser: Any, locked: ServerProcess) -> None:
    with Tab(browser, locked.base_url) as tab:
        page = tab.page
        page.goto(locked.base_url)
        page.wait_for_selector("text=This server asks for an API key.")
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.inner_text("#phase-text") == "asks for a key"
        for wrong in ("sk-wrong", "größer"):
            page.fill("#key", wrong)
            page.keyboard.press("Enter")
            page.wait_for_selector("text=The API key is not valid." if wrong.isascii() else "text=That is no API key")
        assert page.locator("table.matrix").count() == 0
        page.fill("#key", KEY)
        page.click("#use-key")
        page.wait_for_selector("table.matrix")
        assert page.is_hidden("#error")
        kept = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie, location.href]")
        assert kept == [[KEY], 0, "", f"{locked.base_url}/"]
        page.reload()
        page.wait_for_selector("table.matrix")
        page.click("#tab-code")
        code = page.inner_text("pre")
        assert KEY not in code
        assert "$LLM2VEC_KEY" in code


def test_metrics_with_a_key_of_their_own(browser: Any, locked: ServerProcess) -> None:
    with Tab(browser, locked.base_url) as tab:
        page = tab.page
        page.goto(f"{locked.base_url}/#server")
        page.fill("#key", KEY)
        page.click("#use-key")
        page.wait_for_selector("text=The metrics have a key of their own")
        page.wait_for_selector("text=Embedding space")
        page.fill("#metrics-key", "sk-wrong")
        page.click("#live button")
        page.wait_for_selector("text=That key is not valid for the metrics")
        page.fill("#metrics-key", METRICS_KEY)
        page.click("#live button")
        page.wait_for_selector(".tile")
        assert page.inner_text("#device") == "cpu"


def test_the_server_s_figures_are_those_of_its_metrics(tab: Tab, server: ServerProcess) -> None:
    page = tab.open("/#server")
    page.wait_for_selector(".tile")
    page.wait_for_selector("#facts dd")
    facts = dict(
        zip(page.locator("#facts dt").all_inner_texts(), page.locator("#facts dd").all_inner_texts(), strict=True)
    )
    info = httpx.get(f"{server.base_url}/info").json()
    assert facts["Model"] == info["model_id"]
    assert facts["Pooling"] == "mean"
    assert facts["Arithmetic"] == "float32"
    assert facts["Device"] == "cpu"
    assert facts["Vector"] == "64 numbers, may be cut to 16, 32, 64"
    assert facts["Longest input"] == "512 tokens"
    assert facts["One batch"] == f"{info['max_batch_tokens']:,} tokens at most"
    tiles = page.inner_text("#live")
    full = server.metric("llm2vec_batch_tokens_full")
    assert f"of {full:,.0f} tokens" in tiles
    assert page.locator(".tile dt").all_inner_texts() == [
        "Tokens a second",
        "Latency",
        "Waiting",
        "Batch fill",
        "In flight",
        "Requests",
    ]
    embedded = int(page.locator(".tile .value").nth(5).inner_text().replace(",", ""))
    tab.embed(queries="another text")
    page.wait_for_function(
        "before => Number(document.querySelectorAll('.tile .value')[5].textContent.replaceAll(',', '')) > before",
        arg=embedded,
    )
    assert "last minute" in page.inner_text("#live")


def test_quantiles_of_a_histogram(tab: Tab) -> None:
    page = tab.open()
    text = "\n".join(
        f'x_seconds_bucket{{class="{name}",le="{bound}"}} {count}'
        for name, counts in (("bulk", (0, 10, 30, 40, 40)), ("", (50, 50, 50, 50, 50)))
        for bound, count in zip(("0.1", "0.5", "1.0", "2.5", "+Inf"), counts, strict=True)
    )
    found = page.evaluate(
        """async (text) => {
            const { parse, quantile } = await import("/playground/prometheus.js");
            const of = (share, before) => quantile(share, parse(text), before, "x_seconds", (labels) => labels.class);
            return [of(0.5, []), of(0.25, []), of(1, []), Number.isNaN(of(0.5, parse(text)))];
        }""",
        text,
    )
    assert found == [0.75, 0.5, 2.5, True]


MARKUP = '<img src=x onerror="window.ran=1"><script>window.ran=1</script><b id=bold>&amp;</b>'


def test_a_text_with_markup_is_shown_as_text(tab: Tab) -> None:
    page = tab.open()
    tab.embed(queries=MARKUP, documents=f"{MARKUP}\nplain", instruction=f"{MARKUP}:")
    for name in VIEWS:
        page.click(f"#tab-{name}")
        page.wait_for_selector(f"#panel-{name} h2")
        assert page.locator("#results :is(img, script, b)").count() == 0
    assert page.evaluate("window.ran") is None
    page.click("#tab-similarity")
    assert page.inner_text(".ranking h3") == f"Q1 {MARKUP}"
    page.click("#tab-code")
    assert json.dumps(MARKUP)[1:-1] in page.inner_text("pre")


def test_the_map_is_of_the_principal_components(tab: Tab, server: ServerProcess) -> None:
    page = tab.open()
    texts = [f"text number {number} of a map {'long ' * (number % 7)}" for number in range(150)]
    tab.embed(queries="", documents="\n".join(texts), instruction="")
    page.click("#tab-map")
    marks = page.locator("g.mark.document[aria-label]")
    assert marks.count() == 150
    found = vectors(server, texts)
    centred = found - found.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    points, shares = page.evaluate(
        """async (vectors) => {
            const { principal } = await import("/playground/math.js");
            const { points, shares } = principal(vectors);
            return [points, shares];
        }""",
        found.tolist(),
    )
    expected = u[:, :2] * s[:2]
    farthest = np.abs(expected).argmax(axis=0)
    expected *= np.sign(expected[farthest, [0, 1]])
    np.testing.assert_allclose(points, expected, atol=1e-3 * s[0])
    np.testing.assert_allclose(shares, s[:2] ** 2 / (s**2).sum(), atol=1e-6)
    box = marks.nth(3).locator(".point").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.inner_text(".tip") == f"D4 {texts[3].strip()}"


def test_the_map_by_keyboard(tab: Tab) -> None:
    page = tab.open("/#map")
    page.wait_for_selector("g.mark[tabindex='0']")
    page.focus("#tab-map")
    page.keyboard.press("Tab")
    assert page.inner_text(".tip") == f"Q1 {QUERIES[0]}"
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".tip") == f"Q2 {QUERIES[1]}"
    page.keyboard.press("End")
    assert page.inner_text(".tip").startswith("D2 Definition")
    page.keyboard.press("Escape")
    assert page.is_hidden(".tip")
    assert page.locator("g.mark[tabindex='0']").count() == 1


def test_all_of_it_by_keyboard(tab: Tab) -> None:
    page = tab.open()
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    order = ["skip", "queries", "documents", "prompt", "instruction", "embed", "example", "tab-similarity", "scroll"]
    assert [name for name in reached if name in order][: len(order)] == order
    page.focus("#tab-similarity")
    for name in (*VIEWS[1:], VIEWS[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert page.is_visible(f"#panel-{name}")
        assert page.locator("[role=tabpanel]:not([hidden])").count() == 1


def test_a_run_can_be_stopped(tab: Tab) -> None:
    page = tab.open()
    page.route("**/v1/embeddings", lambda route: None)  # never answered
    page.fill("#queries", "something else")
    page.wait_for_selector("text=Changed since")
    page.click("#embed")
    page.wait_for_selector("text=Stop")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    page.unroute("**/v1/embeddings")
    tab.embed()
    assert page.locator("table.matrix tbody tr").count() == 1
    assert page.inner_text("#embed") == "Embed"


def test_a_server_that_loads_is_waited_for(tab: Tab) -> None:
    page = tab.page
    loading = {"error": {"message": "the server is loading"}}
    page.route("**/readyz", lambda route: route.fulfill(status=503, json=loading), times=1)
    page.goto(tab.url)
    page.wait_for_selector("text=The server is loading its model")
    page.wait_for_selector("table.matrix")
    assert page.inner_text("#phase-text") == "ready"
    tab.wrong.remove("Failed to load resource: the server responded with a status of 503 (Service Unavailable)")


def test_a_server_that_is_gone_or_busy_is_said_in_words(tab: Tab) -> None:
    page = tab.open()
    page.route("**/readyz", lambda route: route.abort())
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=The server can’t be reached. Is it still running?")
    page.unroute("**/readyz")
    busy = {"status": 429, "headers": {"retry-after": "7"}, "json": {"error": {"message": "full"}}}
    page.route("**/v1/embeddings", lambda route: route.fulfill(**busy))
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=Try again in 7 s.")
    assert len(tab.wrong) == 2
    tab.wrong.clear()


def test_many_texts_go_in_several_requests(tab: Tab) -> None:
    page = tab.open()
    tab.asked.clear()
    tab.page.fill("#queries", "")
    tab.page.fill("#documents", "\n".join(f"text number {number}" for number in range(130)))
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=130 texts:")
    assert sum("/v1/embeddings" in url for url in tab.asked) == 3
    assert values(page).shape == (60, 40)
    assert "The first 60 × 40 of 130 × 130" in page.inner_text("#panel-similarity")
    page.fill("#documents", "\n".join("x" for _ in range(501)))
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=this page takes 500 at most")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(browser: Any, server: ServerProcess, scheme: str, width: int) -> None:
    axe = npm_folder("axe", AXE) / "node_modules" / "axe-core" / "axe.min.js"
    size = {"width": width, "height": 844}
    with Tab(browser, server.base_url, viewport=size, color_scheme=scheme) as tab:
        page = tab.open()
        page.evaluate(axe.read_text())
        for name in VIEWS:
            page.click(f"#tab-{name}")
            page.wait_for_selector(f"#panel-{name} h2")
            if name == "server":
                page.wait_for_selector(".tile")
            found = page.evaluate("axe.run()")
            serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
            assert not serious, json.dumps(
                [(one["id"], one["nodes"][0]["html"], one["help"]) for one in serious], indent=1
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert tab.wrong == []


def test_the_code_gives_the_same_vectors(tab: Tab, server: ServerProcess) -> None:
    """Each client's, run as it is copied."""
    for package in ("openai", "langchain_openai", "llama_index.embeddings.openai_like"):
        pytest.importorskip(package, reason="the client packages are in the extra `clients`")
    page = tab.open()
    queries = [*QUERIES, 'it\'s "quoted" \\ and $HOME']
    tab.embed(queries="\n".join(queries))
    page.click("#tab-code")
    expected = vectors(server, queries, instruction=INSTRUCTION), vectors(server, DOCUMENTS)
    for language in ("openai", "langchain", "llamaindex"):
        page.check(f"input[value={language}]")
        code = page.inner_text("pre") + "\nimport json; print(json.dumps([query_vectors, document_vectors]))\n"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout.splitlines()[-1])
        for own, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(own, wanted, atol=1e-5, err_msg=language)
    if shutil.which("curl"):
        page.check("input[value=curl]")
        ran = subprocess.run(["sh", "-c", page.inner_text("pre")], capture_output=True, text=True, timeout=60)
        answers = [json.loads(line) for line in re.findall(r'\{"object".*?"usage":\{[^}]*\}\}', ran.stdout)]
        for answer, wanted in zip(answers, expected, strict=True):
            np.testing.assert_allclose([item["embedding"] for item in answer["data"]], wanted, atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="several processes are for Linux only")
def test_a_server_of_several_processes(browser: Any, encoder: Path) -> None:
    settings = {**SETTINGS, "LLM2VEC_FRONTENDS": "2", "LLM2VEC_DEVICE": "cpu"}
    with ServerProcess(encoder, settings, "--dtype", "float32") as several, Tab(browser, several.base_url) as tab:
        page = tab.open()
        np.testing.assert_allclose(values(page), cosines(several, instruction=INSTRUCTION), atol=1e-5)
        page.click("#tab-tokens")
        page.wait_for_selector(".token.instruction")
        page.click("#tab-server")
        page.wait_for_selector(".tile")
        page.wait_for_selector("#device:text('cpu')")
        assert tab.wrong == []
