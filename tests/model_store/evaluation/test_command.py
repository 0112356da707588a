"""The command on tiny models, from arguments to tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model_store.build.build import build_encoder
from model_store.evaluation.command import STAGE_POOLINGS
from model_store.evaluation.local import LocalEncoder
from model_store.evaluation.sts import Sts
from model_store.recipe import recipe_from
from service.cli import main
from tests.tiny import build_tiny, save_adapter, save_base, tiny_model

PAIRS = (
    "score\tsentence1\tsentence2\n"
    "5\ta plane is taking off\tan air plane is taking off\n"
    "3.5\tthe river ran past the mill\tthe mill ground the corn\n"
    "1\ta man is playing a flute\tthe river ran past the mill\n"
    "0\thow much protein a day\ta plane is taking off\n"
)
TAGGED = "the DET\nriver NOUN\nran VERB\n\na DET\nplane NOUN\nruns VERB\n"
LABELLED = "text\tlabel\na plane\tair\nthe river\twater\nan air plane\tair\nthe mill\twater\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    (tmp_path / "words.conll").write_text(TAGGED)
    (tmp_path / "texts.tsv").write_text(LABELLED)
    (tmp_path / "small" / "qrels").mkdir(parents=True)
    (tmp_path / "small" / "corpus.jsonl").write_text('{"_id": "1", "text": "a plane"}\n{"_id": "2", "text": "corn"}\n')
    (tmp_path / "small" / "queries.jsonl").write_text('{"_id": "3", "text": "a plane"}\n')
    (tmp_path / "small" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n3\t1\t1\n")
    return tmp_path


def found_scores(path: Path) -> dict[tuple[str, ...], float]:
    scores = json.loads(path.read_text())["scores"]
    return {(score["model"], score["task"], score["metric"], score["setting"]): score["value"] for score in scores}


def test_every_stage_is_the_encoder_built_with_so_many_adapters(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_base(data / "base")
    adapters = [str(data / name) for name in ("first", "second")]
    for seed, folder in enumerate(adapters):
        save_adapter(Path(folder), tiny_model("llama"), seed)
    (data / "tiny.toml").write_text(f'base = "{data / "base"}"\ndtype = "float32"\nadapters = {json.dumps(adapters)}\n')
    command = ["eval", "--stages", str(data / "tiny.toml"), "--dtype", "float32", "--device", "cpu"]
    command += ["--sts", str(data / "pairs.tsv"), "--words", *[str(data / "words.conll")] * 2]
    assert main([*command, "--json", str(data / "a.json"), "--picture", str(data / "a.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("STS, pairs.tsv: Spearman × 100\n")
    assert (data / "a.png").read_bytes().startswith(b"\x89PNG")
    scores = found_scores(data / "a.json")

    expected = {}
    stages = [("causal", 0), ("bidirectional", 0), ("+ first", 1), ("+ second", 2)]
    for name, merged in stages:
        built = data / f"built for {name}"
        parts = {"base": str(data / "base"), "dtype": "float32", "adapters": tuple(adapters[:merged])}
        attention = "causal" if name == "causal" else None
        build_encoder(recipe_from("x", **parts, attention=attention), built)
        encoder = LocalEncoder.load(built, STAGE_POOLINGS, "cpu", "float32")
        for score in Sts(data / "pairs.tsv").evaluate(name, encoder):
            expected[score.model, score.task, score.metric, score.setting] = score.value
    assert expected.items() <= scores.items()
    assert list(dict.fromkeys(key[0] for key in scores)) == [name for name, _ in stages]
    assert {key[3] for key in scores if key[1] == "words, words.conll, tag"} == {"same_token", "next_token"}

    # Other adapters in the recipe's place.
    assert main([*command, "--adapter", adapters[1], "--json", str(data / "b.json")]) == 0
    others = found_scores(data / "b.json")
    assert list(dict.fromkeys(key[0] for key in others)) == ["causal", "bidirectional", "+ second"]
    one = ("STS, pairs.tsv", "Spearman", "mean")
    assert others["bidirectional", *one] == scores["bidirectional", *one]


def test_a_stored_encoder_on_every_kind_of_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny(data / "tiny", pooling="weighted_mean")
    command = ["eval", "--model", str(data / "tiny"), "--device", "cpu", "--retrieval", str(data / "small")]
    command += ["--classification", *[str(data / "texts.tsv")] * 2, "--sts", str(data / "pairs.tsv")]
    assert main([*command, "--json", str(data / "a.json")]) == 0
    scores = found_scores(data / "a.json")
    assert {(key[0], key[3]) for key in scores} == {("tiny", "weighted_mean")}
    assert scores["tiny", "retrieval, small", "MRR", "weighted_mean"] == 1  # the query is the document's very text
    assert scores["tiny", "classification, texts.tsv", "accuracy", "weighted_mean"] == 1  # four texts in 64 dimensions
    assert main([*command, "--pooling", "mean", "--pooling", "last_token"]) == 0
    assert "        mean  last_token\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("mteb", ["--mteb", "STSBenchmark"], "--mteb needs mteb"),
        ("sklearn", ["--classification", "a.tsv", "b.tsv"], "--classification needs scikit-learn"),
    ],
)
def test_a_package_of_the_extra_that_is_not_installed(package: str, arguments: list[str], message: str) -> None:
    hidden = f"import sys; sys.modules['{package}'] = None; from service.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hidden, "eval", "--model", "demo", *arguments]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert message in found.stderr
    assert "pip install 'llm2vec-service[eval]'\n" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo"], "nothing to evaluate on: give --sts"),
        (["--url", "http://127.0.0.1:9", "--words", "a", "b"], "--words needs the encoder itself"),
        (["--url", "http://127.0.0.1:9", "--sts", "pairs.tsv", "--pooling", "mean"], "--pooling needs the encoder"),
        (["--model", "demo", "--adapter", "a", "--sts", "pairs.tsv"], "--adapter goes with --stages"),
        (["--model", "demo", "--sts", "absent.tsv"], "absent.tsv can't be read"),
        (["--model", "demo", "--sts", "pairs.tsv", "--json", "no/where.json"], "no is no folder"),
        (["--model", "dome", "--sts", "pairs.tsv"], "there is no recipe 'dome'"),
        (["--url", "http://127.0.0.1:9", "--sts", "pairs.tsv"], "is the server running"),
    ],
)
def test_what_can_not_be_evaluated_is_said_before_anything_is(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(data)
    assert main(["eval", *arguments]) == 1
    assert message in capsys.readouterr().err
