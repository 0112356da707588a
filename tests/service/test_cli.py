"""The command's errors, each in one sentence but for faults of the program; its help; its completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from model_store.recipe import packaged_recipes
from service.cli import main
from service.settings import SECRETS, Settings

COMMANDS = ("serve", "build", "verify", "export", "show", "embed", "plan", "eval", "train", "mine", "pairs", "merge")


@pytest.mark.parametrize("fault", ['ValueError("bug")', 'OSError("bug")', 'OSError(9, "bug")', 'KeyError("bug")'])
def test_a_fault_deep_inside_keeps_its_traceback(fault: str, tmp_path: Path) -> None:
    """Planted in a package that the command imports."""
    (tmp_path / "transformers.py").write_text(f"raise {fault}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = _command(tmp_path, "plan", "--model", str(tmp_path), "--gpu", "l4")
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert "bug" in found.stderr.splitlines()[-1]


def _command(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(packages), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "absent"], "absent is not a stored encoder: it has no manifest.json"),
        (["build", "--base", "{here}/absent", "--out", "{here}/out"], "is no folder and no hub id"),
        (["build", "--recipe", "absent"], "there is no recipe 'absent'"),
        (["build", "--recipe", "{here}/here.toml/x.toml", "--out", "{here}/out"], "there is no recipe file"),
        (["build", "--base", "demo:", "--out", "{here}/here.toml/out"], "File exists: '{here}/here.toml'"),
        (["serve", "--port", "many"], "LLM2VEC_PORT is 'many': it must be a whole number"),
        (["plan", "--model", "{here}", "--gpu", "l4"], "{here}/config.json is not valid JSON: "),
        (["embed", "{here}/absent.txt", "--out", "{here}/out"], "absent.txt"),
        (["train", "mntp", "{here}/absent.json"], "absent.json can't be read: "),
        (["merge", "{here}/absent", "--weights", "1", "--out", "{here}/out"], "is no folder and no hub id"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here.toml").write_text("=")
    (tmp_path / "config.json").write_text("{")
    assert main([argument.format(here=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llm2vec-service: ")
    assert error.count("\n") == 1
    assert told.format(here=tmp_path) in error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Missing command"),
        (["serv"], "No such command 'serv'. Did you mean 'serve'?"),
        (["serve", "--api-keys", "secret"], "No such option: --api-keys"),
        (["serve", "--port"], "Option '--port' requires an argument"),
        (["build", "--dtype", "int4"], "'int4' is not one of 'bfloat16', 'float32'"),
        (["build", "--max-length", "long"], "--max-length"),
        (["train", "mntpx", "config.json"], "'mntpx' is not one of 'mntp', 'simcse', 'supervised'"),
        (["train"], "Missing argument 'stage'"),
        (["plan", "--model", "demo", "--gpu"], "Option '--gpu' requires an argument"),
        (["plan", "--model", "demo", "--gpu", "l4", "--json", "h200"], "h200"),
        (["plan", "--model", "demo", "--gpu", "l4", "--efficiency", "1", "--timed", "1", "1"], "not allowed with"),
        (["eval", "--sts", "pairs.tsv"], "give one of --url, --model and --stages"),
        (["eval", "--url", "http://127.0.0.1:9", "--model", "demo"], "--model: not allowed with --url"),
        (["eval", "--model", "demo", "--words", "a"], "--words: two files are needed"),
        (["eval", "--model", "demo", "--words", "a", "b", "c"], "unexpected extra argument"),
        (["eval", "--model", "demo", "--pooling", "eos_token"], "'eos_token' is not one of mean"),
        (["mine", "pairs.jsonl", "--out", "out.jsonl"], "give one of --url and --model"),
        (["mine", "pairs.jsonl", "--out", "out.json", "--model", "demo"], "out.json must end in .jsonl"),
        (["pairs", "a.txt", "--out", "out.jsonl", "--task", "crops"], "'crops' is not one of sentence, crop, title"),
    ],
)
def test_arguments_that_can_not_be_read_are_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("llm2vec-service: ")
    assert error.count("\n") == 1
    assert told in error
    assert "secret" not in error


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The help, without the frame around it."""
    assert main([*arguments, "--help"]) == 0
    return re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", "", capsys.readouterr().out)


def blocks(text: str) -> dict[str, str]:
    """What the help says of each option, by its name."""
    found = re.split(r"^ +\*? *(--[\w-]+)", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


OPTIONS = {name: field for name, field in Settings.model_fields.items() if name not in SECRETS}


@pytest.mark.usefixtures("columns")
def test_the_help_of_serve_has_the_type_and_the_default_of_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    options = blocks(shown(capsys, "serve"))
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} | {"--help"} == {*options, "--help"}
    for name, field in OPTIONS.items():
        block = options[f"--{name.replace('_', '-')}"]
        assert all(word in block for word in _type_words(field)), (name, block)
        if field.default not in (None, "", ()):
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert f"[default: {default}]" in " ".join(block.split()), (name, block)
        for rule in field.metadata:
            assert all(str(bound) in block for bound in _bounds(rule)), (name, block)


def _type_words(field: FieldInfo) -> list[str]:
    kinds: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
    if choices := next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ()):
        return [*choices, "|"]
    if bool in kinds:
        return ["<true|false>"]
    if field.annotation == dict[str, str]:
        return ["<json>"]
    return [next(f"<{word}>" for kind, word in _WORDS.items() if kind in kinds)]


_WORDS: dict[Any, str] = {int: "int", float: "float", Path: "path", str: "str"}


def _bounds(rule: object) -> list[object]:
    return [getattr(rule, sign) for sign in ("ge", "gt", "le") if hasattr(rule, sign)]


@pytest.mark.usefixtures("columns")
def test_the_help_of_serve_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.split(r"^ ([A-Z][A-Za-z ]*[a-z]) *$", shown(capsys, "serve"), flags=re.MULTILINE)
    groups = dict(zip(found[1::2], found[2::2], strict=True))
    assert list(groups) == [
        "Options",
        "Model and texts",
        "Device and batches",
        "HTTP and limits",
        "Security",
        "Operations",
    ]
    assert "--model" in blocks(groups["Model and texts"])
    assert "--token-budget" in blocks(groups["Device and batches"])
    assert "--port" in blocks(groups["HTTP and limits"])
    assert [*blocks(groups["Security"])] == ["--api-keys-file", "--cors-origins"]
    assert "--log-level" in blocks(groups["Operations"])


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_s_name_is_cut_in_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, command)
    assert not re.search(r"--[\w-]+…", text)
    assert main([command, "-h"]) == 0


@pytest.mark.parametrize(
    ("shell", "told"), [("bash", "complete -o default -F"), ("zsh", "compdef"), ("fish", "complete")]
)
def test_completion_scripts(
    shell: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_LLM2VEC_SERVICE_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert not ended.value.code
    script = capsys.readouterr().out
    assert told in script
    assert "llm2vec-service" in script


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("llm2vec-service ", {*COMMANDS}),
        ("llm2vec-service serve --token-b", {"--token-budget"}),
        ("llm2vec-service serve --truncation ", {"token", "reference"}),
        ("llm2vec-service serve --playground ", {"true", "false"}),
        ("llm2vec-service eval --pooling m", {"mean"}),
        ("llm2vec-service plan --gpu l4 h200 --quanti", {"--quantization"}),
    ],
)
def test_the_shell_completes(
    words: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_LLM2VEC_SERVICE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit):
        main([])
    assert set(capsys.readouterr().out.split()) == offered


def test_recipes_are_listed_in_groups_by_what_their_vectors_were_compared_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["build", "--list"]) == 0
    columns, *groups = [block.splitlines() for block in capsys.readouterr().out.split("\n\n")]
    assert columns == [f"{'recipe':39} {'weights':>8} {'GPU':>9}  what it is"]
    listed = {mark.split(",")[0].split(":")[0]: [row.split()[0] for row in rows] for mark, *rows in groups}
    assert listed["Trained here"] == ["demo"]
    assert "llama3-8b-supervised" in listed["LLM2Vec"]
    assert "qwen3-embedding-8b" in listed["Not LLM2Vec"]
    assert sum(map(len, listed.values())) == len(packaged_recipes())
    assert all(len(row.split("GB")) >= 2 for _, *rows in groups for row in rows)


@pytest.mark.parametrize(("no_color", "plain"), [("", False), ("1", True)])
def test_no_color_is_plain_text_on_a_terminal(no_color: str, plain: bool) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TTY_COMPATIBLE", "FORCE_COLOR")}
    terminal, ours = os.openpty()
    subprocess.run(
        [sys.executable, "-m", "service", "verify", "--help"],
        env={**inherited, "NO_COLOR": no_color, "TERM": "xterm-256color", "GITHUB_ACTIONS": ""},
        stdout=ours,
        cwd=Path(__file__).parents[2],
        timeout=120,
        check=True,
    )
    os.close(ours)
    printed = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert b"verify" in printed
    assert (b"\x1b[" not in printed) is plain
