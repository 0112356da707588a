"""Teachers that give vectors: a server, a stored encoder, one of sentence-transformers; and what the page shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model_store.evaluation.command import EmbedTexts
from model_store.training.config import TrainingConfigError, parse_config
from model_store.training.run import train
from model_store.training.teacher import local_teacher, teacher_vectors
from model_store.training.texts import Example, TrainingDataError, read_contrastive
from service.bulk.client import embed_texts
from service.errors import ServiceError
from tests.e2e.process import ServerProcess
from tests.model_store.training.runs import texts, tiny_config, write_scored
from tests.tiny import build_tiny, save_base

DOCS = Path(__file__).parents[3] / "docs" / "training.md"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "stored"
    build_tiny(folder, "gemma3_text", query_instruction="Find:")
    return folder


@pytest.fixture(scope="module")
def server(stored: Path) -> Iterator[ServerProcess]:
    with ServerProcess(stored) as running:
        yield running


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as sentence-transformers saves it; vectors are not normalised, and queries have a prompt."""
    package = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = tmp_path_factory.mktemp("sentence-transformer")
    save_base(folder / "base", "qwen3", seed=3)
    settings = {"pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    transformer = modules.Transformer(str(folder / "base"), max_seq_length=64)
    model = package.SentenceTransformer(
        modules=[transformer, modules.Pooling(64, "mean")], prompts={"query": "query: ", "document": ""}, device="cpu"
    )
    model.save(str(folder / "saved"))
    return folder / "saved"


def supervised(folder: Path, **changes: Any) -> dict[str, Any]:
    given = tiny_config("supervised", folder, **{"max_steps": 2, "save_steps": 1, **changes})
    write_scored(Path(given["train_file"]))
    return given


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_server_and_its_encoder_are_the_same_teacher(stored: Path, server: ServerProcess, tmp_path: Path) -> None:
    """Also with instructions in the data, in the place of the teacher's own."""
    examples = [
        Example("which river?", ("the river",), ("a plane",)),
        Example("which river?", ("the river",), ("a flute",), "Retrieve:", "Passage:"),
    ]
    loads: dict[str, Callable[[], EmbedTexts]] = {
        "local": lambda: local_teacher(str(stored), CPU),
        "served": lambda: partial(embed_texts, server.base_url),
    }
    found = []
    for name, load in loads.items():
        (tmp_path / name).mkdir()
        found.append(teacher_vectors(examples, name, load, tmp_path / name, None))
    local, served = found
    assert len(local.places) == 6  # "the river" has two instructions
    for one, other in zip(local.of(examples), served.of(examples), strict=True):
        assert (one - other).abs().max() < 1e-2  # both compute in bfloat16 where the CPU has it
        torch.testing.assert_close(one.norm(dim=1), torch.ones(len(one)))
    queries, _ = local.of(examples)
    assert (queries[0] - queries[1]).abs().max() > 3e-2


def test_a_teacher_is_asked_once(stored: Path, tmp_path: Path) -> None:
    """A run that goes on arrives at the same adapter when the server has gone: after a step, and before any."""
    changes: dict[str, Any] = {"distillation_loss": "EmbedDistillLoss", "absolute_margin": 0.0}
    with ServerProcess(stored) as running:
        given = supervised(tmp_path, **changes, matryoshka_dims=[64, 16], teacher_url=running.base_url)
        folder = train(parse_config("supervised", given), embed_by_server=embed_texts)
    (path,) = folder.glob("teacher-*.npy")
    assert np.load(path).shape[1] == 64
    whole = load_file(folder / "adapter_model.safetensors")
    for lost in (["checkpoint-2"], ["checkpoint-1", "checkpoint-2"]):
        (folder / "adapter_model.safetensors").unlink()
        for name in lost:
            shutil.rmtree(folder / name)
        train(parse_config("supervised", given), resume=True, embed_by_server=embed_texts)
        resumed = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ServiceError, match="is the server running"):
        train(parse_config("supervised", {**given, "overwrite_output_dir": True}), embed_by_server=embed_texts)
    assert not list(folder.glob("teacher-*.npy"))
    with pytest.raises(TrainingConfigError, match="teacher_url is asked through the command"):
        train(parse_config("supervised", {**given, "overwrite_output_dir": True}))


def test_a_teacher_of_sentence_transformers_has_its_own_prompts(sentence_transformer: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    path = write_scored(tmp_path / "data.jsonl", 9)
    examples = read_contrastive(path)
    found = teacher_vectors(examples, "it", lambda: local_teacher(str(sentence_transformer), CPU), tmp_path, 64)
    queries, passages = found.of(examples)
    model = package.SentenceTransformer(str(sentence_transformer), device="cpu")
    options = {"normalize_embeddings": True, "convert_to_tensor": True}
    expected = model.encode_query([each.query for each in examples], **options)
    assert (queries - expected).abs().max() < 1e-5
    expected = model.encode_document([text for each in examples for text in each.passages], **options)
    assert (passages - expected).abs().max() < 1e-5


def test_what_a_teacher_can_not_do_is_named(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    examples = [Example(text, (text,)) for text in texts(3)]
    with pytest.raises(
        TrainingConfigError, match="vectors of 64 dimensions and the base of 128: EmbedDistillLoss needs"
    ):
        teacher_vectors(examples, "it", lambda: local_teacher(str(stored), CPU), tmp_path, 128)

    def nothing(texts: Any, instruction: Any, role: Any) -> Any:
        return np.zeros((len(texts), 4), dtype=np.float32)

    with pytest.raises(TrainingDataError, match="the teacher has no vector for the text that begins 'a and as'"):
        teacher_vectors(examples, "it", lambda: nothing, tmp_path, None)
    assert not list(tmp_path.glob("*.npy"))
    with pytest.raises(TrainingConfigError, match=r"teacher_model .*nowhere can't be loaded"):
        local_teacher(str(tmp_path / "nowhere"), CPU)


def documented() -> list[dict[str, Any]]:
    """The configurations and parts of configurations in docs/training.md."""
    blocks = re.findall(r"^```json\n(.*?)^```", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [json.loads(block) for block in blocks]


@pytest.mark.parametrize("given", documented(), ids=lambda given: "-".join(given)[:60])
def test_what_the_page_shows_runs(given: dict[str, Any], stored: Path, server: ServerProcess, tmp_path: Path) -> None:
    """On a tiny base: with its own widths, a teacher that there is, and a few short steps."""
    if "mlm_probability" in given:
        own = {
            "model_name_or_path",
            "train_file",
            "output_dir",
            "per_device_train_batch_size",
            "max_steps",
            "torch_dtype",
        }
        kept = {key: value for key, value in given.items() if key not in own}
        config = parse_config("mntp", {**tiny_config("mntp", tmp_path, max_steps=2), **kept})
    else:
        small: dict[str, Any] = {"teacher_url": server.base_url, "teacher_model": str(stored)}
        small["matryoshka_dims"] = [64, 32, 16, 8][: len(given.get("matryoshka_dims", ()))]
        part = {key: small.get(key, value) for key, value in given.items()}
        config = parse_config("supervised", supervised(tmp_path, **part))
    assert len(losses(train(config, embed_by_server=embed_texts))) == 2


def test_the_page_shows_every_kind_of_loss() -> None:
    """A control: were the page's parts not found, nothing would be run."""
    assert {key for given in documented() for key in given} >= {
        *("mlm_probability", "absolute_margin", "relative_margin", "matryoshka_dims", "matryoshka_weights"),
        *("distillation_loss", "teacher_url", "teacher_model", "contrastive_weight", "distillation_weight"),
    }


def test_the_lines_that_the_page_shows_are_read(tmp_path: Path) -> None:
    blocks = re.findall(r"^```\n(\{.*?)^```", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block)
        assert all(each.passages for each in read_contrastive(path))
