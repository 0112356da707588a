"""References to models, with a small hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model_store.build import progress
from model_store.build.build import build_encoder
from model_store.build.sources import SourceError, resolve, wanted_files
from model_store.recipe import load_recipe, recipe_from
from model_store.training.config import Stage, parse_config
from tests.tiny import save_adapter, save_base, tiny_model

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class _Hub(BaseHTTPRequestHandler):
    """The few calls of the hub's HTTP interface that fetching a repository makes."""

    folders: dict[str, Path]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "tree" in parts:
            self._tree("/".join(parts[2:4]))
        elif parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif "resolve" in parts:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._answer(404, b"")

    do_HEAD = do_GET  # noqa: N815

    def _info(self, repository: str, revision: str) -> None:
        if repository == "org/gated":
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        commit = COMMITS.get(revision, revision)
        if repository not in self.folders or commit not in COMMITS.values():
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path.name} for path in self.folders[repository].iterdir()]
        content = {"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        return self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _tree(self, repository: str) -> None:
        entries = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in self.folders[repository].iterdir()
        ]
        self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, commit: str, name: str) -> None:
        content = (self.folders[repository] / name).read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    handler = type("Hub", (_Hub,), {"folders": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_offline_what_was_fetched_before_is_used(
    hub: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(tmp_path / "repository")
    hub.folders["org/base"] = tmp_path / "repository"
    with resolve("org/base") as fetched:
        commit = fetched.commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    with resolve("org/base") as source:
        assert (source.folder, source.commit) == (fetched.folder, commit)
    with pytest.raises(SourceError, match=r"org/other is not in the cache, and HF_HUB_OFFLINE"), resolve("org/other"):
        pass
    assert len(hub.asked) == asked


def test_a_folder_is_itself(tmp_path: Path) -> None:
    with resolve(str(tmp_path)) as source:
        assert source.folder == tmp_path
        assert source.commit is None


def test_what_is_neither_folder_nor_hub_id() -> None:
    for reference in ("/nowhere", "just-a-name", "a/b/c", "https://example.com/model", "../escape"):
        with pytest.raises(SourceError, match="no folder and no hub id"), resolve(reference):
            pass


def test_the_demo_s_adapters_come_with_the_package() -> None:
    """Under names that any machine knows."""
    for reference in load_recipe("demo").adapters:
        with resolve(reference) as source:
            assert json.loads((source.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo:"
            assert (source.folder / "adapter_model.safetensors").stat().st_size > 1_000_000
    with resolve("demo:mntp") as source:
        assert json.loads((source.folder / "config.json").read_text())["_name_or_path"] == "demo:"
    with pytest.raises(SourceError, match=r"no demo:\.\.: use demo:, demo:mntp, demo:simcse"), resolve("demo:.."):
        pass


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_the_demo_s_training_can_be_asked_for_again(stage: Stage) -> None:
    with resolve(f"demo:{stage}") as source:
        config = parse_config(stage, json.loads((source.folder / "training_config.json").read_text()))
    assert config.base == "demo:"


def test_a_hub_id_is_pinned_to_its_commit(hub: type[_Hub], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "base" / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, tiny_model("llama"), 0)
    hub.folders.update({"org/base": tmp_path / "base", "org/adapter": adapter})
    recipe = recipe_from("hub", base="org/base", adapters=["org/adapter@v1"], dtype="float32")
    manifest = build_encoder(recipe, tmp_path / "encoder")
    assert manifest.base.commit == COMMITS["main"]
    assert [stage.commit for stage in manifest.adapters] == [COMMITS["v1"]]
    assert not [path for path in hub.asked if path.endswith(".py")]
    assert not [path for path in hub.asked if "/resolve/main/" in path]


def test_without_a_terminal_fetching_is_told_in_whole_lines(
    hub: type[_Hub], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    save_base(tmp_path / "base")
    hub.folders["org/base"] = tmp_path / "base"
    capfd.readouterr()
    with resolve("org/base") as source:
        size = sum(path.stat().st_size for path in source.folder.iterdir())
    told = capfd.readouterr().err
    assert "\r" not in told
    assert told.endswith("\n")
    assert f"{size / 1000:.0f}k" in told
    assert "Fetching" in told


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "x.gguf"], ["model.safetensors"]),
        (["consolidated.safetensors", "model-00001-of-00002.safetensors"], ["model-00001-of-00002.safetensors"]),
        (["pytorch_model-00001-of-00002.bin", "training_args.bin"], ["pytorch_model-00001-of-00002.bin"]),
        (["adapter_model.safetensors", "adapter_model.bin"], ["adapter_model.safetensors"]),
        (["model.Q4_K_M.gguf"], ["model.Q4_K_M.gguf"]),
        (["original/model.safetensors", "modeling_llama.py"], []),
        (["pytorch_model.bin", "adapter_model.safetensors"], ["pytorch_model.bin", "adapter_model.safetensors"]),
        (
            ["model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors", "onnx/config.json"],
            ["model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors"],
        ),
    ],
)
def test_only_one_format_is_fetched_and_never_code(names: list[str], weights: list[str]) -> None:
    found = wanted_files([*names, "config.json", "tokenizer.model"], "org/base")
    assert found == ["config.json", "tokenizer.model", *weights]


def test_of_several_gguf_files_the_one_that_is_named_is_fetched(hub: type[_Hub], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("base.Q4_K_M.gguf", "base.Q8_0.gguf", "tokenizer.json"):
        (repository / name).write_text(name)
    hub.folders["org/base"] = repository
    with (
        pytest.raises(SourceError, match=r"base.Q8_0.gguf: name one of them, as in org/base:base.Q"),
        resolve("org/base"),
    ):
        pass
    with (
        pytest.raises(SourceError, match=r"org/base has no other.gguf: its GGUF files are base.Q4_K_M.gguf, b"),
        resolve("org/base:other.gguf"),
    ):
        pass
    for reference in ("org/base:base.Q8_0.gguf", f"{repository}:base.Q8_0.gguf"):
        with resolve(reference) as source:
            assert sorted(path.name for path in source.folder.iterdir()) == ["base.Q8_0.gguf", "tokenizer.json"]
            assert (source.folder / "base.Q8_0.gguf").read_text() == "base.Q8_0.gguf"
    assert not any("Q4_K_M" in path for path in hub.asked)


def test_what_the_hub_refuses_names_the_way_out(hub: type[_Hub]) -> None:
    with pytest.raises(SourceError, match=r"gated.*HF_TOKEN"), resolve("org/gated"):
        pass
    with pytest.raises(SourceError, match="no repository org/absent"), resolve("org/absent"):
        pass


def test_no_hub_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="check the network"), resolve("org/base"):
        pass
