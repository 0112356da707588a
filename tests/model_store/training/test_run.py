"""Whole runs: what they leave, how they go on after a kill, and that what is trained is what is served."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from model_store.build.build import build_encoder
from model_store.build.description import TRAINED_FILE, DescriptionError
from model_store.build.sources import resolve
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.recipe import recipe_from
from model_store.templates import VERBATIM
from model_store.text.tokenizer import TextTokenizer
from model_store.training.config import Stage, TrainingConfigError, parse_config
from model_store.training.resume import whole_checkpoints
from model_store.training.run import prepare, train, training_arguments
from model_store.training.texts import TrainingDataError, read_examples
from service.cli import main
from tests.model_store.training.runs import EVERY_LOSS, texts, tiny_config, write_scored, write_texts
from tests.tiny import FAMILIES, normalized, save_base

ROOT = Path(__file__).parents[3]


def run(stage: Stage, folder: Path, resume: bool = False, **changes: Any) -> Path:
    return train(parse_config(stage, tiny_config(stage, folder, **changes)), resume)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_a_killed_run_goes_on_to_the_very_same_adapter(stage: Stage, tmp_path: Path) -> None:
    """Killed after step 6, going on from the checkpoint of step 4; in bfloat16, in the second epoch of 32 examples.

    The control is a run with another seed.
    """
    changes: dict[str, Any] = {"torch_dtype": "bfloat16", "max_train_samples": 32, "gradient_cache_chunk_size": 3}
    if stage == "mntp":
        del changes["gradient_cache_chunk_size"]
    whole = run(stage, tmp_path, **changes, output_dir=str(tmp_path / "whole"))
    given = tiny_config(stage, tmp_path, **changes, output_dir=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "tests.model_store.training.runs", stage, str(tmp_path / "config.json"), "6"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in whole_checkpoints(tmp_path / "killed")] == ["checkpoint-4"]
    assert main(["train", stage, str(tmp_path / "config.json"), "--resume"]) == 0

    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, tmp_path / "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "killed") == losses(whole)
    other = run(stage, tmp_path, **changes, seed=7, output_dir=str(tmp_path / "other"))
    assert losses(other) != losses(whole)


def test_a_checkpoint_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = run("mntp", tmp_path)
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    (folder / "checkpoint-12" / "trainer_state.json").unlink()
    assert whole_checkpoints(folder)[-1].name == "checkpoint-8"


def test_a_run_goes_on_with_its_own_configuration_only(tmp_path: Path) -> None:
    run("mntp", tmp_path)
    with pytest.raises(TrainingConfigError, match=r"begun with another mlm_probability, learning_rate: put it back"):
        run("mntp", tmp_path, resume=True, mlm_probability=0.4, learning_rate=1e-4)
    run("mntp", tmp_path, resume=True, logging_steps=5, save_total_limit=2)


def test_a_run_goes_on_with_its_own_texts_only(tmp_path: Path) -> None:
    run("mntp", tmp_path)
    config = parse_config("mntp", tiny_config("mntp", tmp_path))
    assert config.train_file
    write_texts(config.train_file, 65)
    with pytest.raises(TrainingConfigError, match=r"begun with another content of the training data: put it back"):
        train(config, resume=True)


@pytest.mark.parametrize("named", ["<eos>", {"content": "<eos>", "special": True}])
def test_the_mask_token_eos_is_the_tokenizer_s(named: Any, tmp_path: Path) -> None:
    """As in the official scripts; config.json may name several, of which the first is another."""
    given = tiny_config("mntp", tmp_path, max_steps=1)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 2]}))
    config = parse_config("mntp", given)
    arguments = training_arguments(config)
    config.output_dir.mkdir()
    for settings, expected in (({}, 0), ({"eos_token": named}, 2)):
        (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
        with resolve(str(tmp_path / "base")) as base:
            trainer = prepare(config, arguments, read_examples(config, arguments), base, ())
        assert trainer.data_collator.masking.mask_token == expected


def test_an_output_dir_in_use_is_refused_or_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "mntp"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(TrainingConfigError, match="is not empty: set overwrite_output_dir true"):
        run("mntp", tmp_path)
    run("mntp", tmp_path, overwrite_output_dir=True)
    first = losses(folder)
    run("mntp", tmp_path, overwrite_output_dir=True, seed=5)
    assert losses(folder) != first
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("stage", ["mntp", "simcse", "supervised"])
def test_it_learns(stage: Stage, tmp_path: Path) -> None:
    folder = run(stage, tmp_path, lora_dropout=0.0, max_steps=40, save_strategy="no")
    found = losses(folder)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])


class SumsOfGradients(TrainerCallback):  # type: ignore[misc]
    """Of each update: how far the gradients that reach AdamW are from the float64 sums of the batches' own."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self._summed: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for name, parameter in others["model"].named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._add, name))

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        self._summed[name] = self._summed.get(name, torch.zeros((), dtype=torch.float64)) + gradient.double()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        parameters = dict(others["model"].named_parameters())
        for name, expected in self._summed.items():
            error = (parameters[name].grad.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            self.errors.append(error.item())
        self._summed.clear()


def test_gradients_of_a_16_bit_base_are_summed_in_float32(tmp_path: Path) -> None:
    """Eight batches an update. Their sum in bfloat16 is off by a hundredth."""
    sums = SumsOfGradients()
    changes: dict[str, Any] = {"gradient_accumulation_steps": 8, "max_steps": 2, "save_strategy": "no"}
    config = tiny_config("mntp", tmp_path, **changes, torch_dtype="bfloat16", max_grad_norm=0)
    folder = train(parse_config("mntp", config), callbacks=[sums])
    assert len(sums.errors) == 2 * 3 * 7 * 2
    assert max(sums.errors) < 1e-6
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_steps_to_stop_after_leave_the_learning_rate_as_planned(tmp_path: Path) -> None:
    folder = run("mntp", tmp_path, stop_after_n_steps=6)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[-1] == pytest.approx(3e-3 * (12 - 5) / 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_is_served(family: str, tmp_path: Path) -> None:
    """MNTP, then supervised on top; the trainer's own vectors are those of the encoder that `build` makes of both."""
    short: dict[str, Any] = {"max_steps": 3, "save_strategy": "no", "family": family}
    mntp = run("mntp", tmp_path, **short)
    second = run("supervised", tmp_path, **short, peft_model_name_or_path=str(mntp))
    build_encoder(
        recipe_from("tiny", base=str(tmp_path / "base"), adapters=[str(mntp), str(second)], dtype="float32"),
        tmp_path / "encoder",
    )
    encoder = Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")
    given = texts(9)
    rows = TextTokenizer.load(tmp_path / "encoder", encoder.manifest).encode_batch(given, [""] * len(given))
    served = normalized(encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling)))

    config = parse_config("supervised", tiny_config("supervised", tmp_path, peft_model_name_or_path=str(mntp)))
    arguments = training_arguments(config)
    with resolve(str(tmp_path / "base")) as base, resolve(str(mntp)) as before:
        trainer = prepare(config, arguments, read_examples(config, arguments), base, (before,))
    trainer._load_from_checkpoint(str(second))
    trainer.model.eval()
    with torch.no_grad():
        trained = torch.from_numpy(trainer.encode(given))
    assert (served - trained).abs().max() < 1e-5
    without = build_encoder(
        recipe_from("tiny", base=str(tmp_path / "base"), adapters=[str(mntp)], dtype="float32"), tmp_path / "first"
    )
    first = Encoder.load(tmp_path / "first", device="cpu", dtype="float32")
    assert without.pooling == "mean"
    control = normalized(first.encode(PackedBatch.pack(rows, "mean")))
    assert (served - control).abs().max() > 1e-3


def test_files_have_the_published_shape(tmp_path: Path) -> None:
    mntp = run("mntp", tmp_path, max_steps=2)
    second = run("simcse", tmp_path, max_steps=2, peft_model_name_or_path=str(mntp))
    tensors = load_file(mntp / "adapter_model.safetensors")
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert len(tensors) == 3 * 7 * 2
    config = json.loads((mntp / "config.json").read_text())
    assert config["_name_or_path"] == str(tmp_path / "base")
    assert "auto_map" not in config
    adapter = json.loads((second / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "base")
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (4, 8, None)
    assert sorted(adapter["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert not (second / "config.json").exists()
    pooled = json.loads((second / "llm2vec_config.json").read_text())
    assert pooled == {"pooling_mode": "mean", "skip_instruction": True}
    base_tokenizer = (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert (mntp / "tokenizer.json").read_bytes() == base_tokenizer


def test_evaluation_is_logged(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    sentences = texts(12)
    lines = [f"{n % 5}\t{one}\t{other}" for n, (one, other) in enumerate(pairwise(sentences))]
    pairs.write_text("score\tsentence1\tsentence2\n" + "\n".join(lines) + "\n")
    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "validation_split_percentage": 25}
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "spearman",
        "greater_is_better": True,
    }
    folder = run("simcse", tmp_path, **evaluated, **best, eval_sts_file=str(pairs))
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in found] == [4, 8, 12]
    assert all(-1 <= entry["eval_spearman"] <= 1 for entry in found)
    best_step = max(found, key=lambda entry: entry["eval_spearman"])["step"]
    kept, chosen = (
        load_file(path / "adapter_model.safetensors") for path in (folder, folder / f"checkpoint-{best_step}")
    )
    assert all(torch.equal(kept[name], chosen[name]) for name in kept)
    (events,) = folder.glob("runs/*")
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/spearman"} <= set(scalars)


def test_mntp_is_evaluated_on_the_same_masks_each_time(tmp_path: Path) -> None:
    folder = run("mntp", tmp_path, do_eval=True, eval_strategy="steps", eval_steps=6, learning_rate=0.0)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [(entry["eval_loss"], entry["eval_accuracy"]) for entry in log if "eval_loss" in entry]
    assert len(found) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", ["mntp", "simcse", "supervised"])
def test_a_causally_trained_adapter_makes_a_causal_encoder(stage: Stage, tmp_path: Path) -> None:
    """By itself, from the output_dir as from a checkpoint; a recipe that says otherwise wins."""
    folder = run(stage, tmp_path, bidirectional=False, max_steps=4)
    parts: dict[str, Any] = {"base": str(tmp_path / "base"), "dtype": "float32"}
    for adapter in (folder, folder / "checkpoint-4"):
        recipe = recipe_from("tiny", **parts, adapters=[str(adapter)])
        assert build_encoder(recipe, tmp_path / f"of {adapter.name}").attention == "causal"
    recipe = recipe_from("tiny", **parts, adapters=[str(folder)], attention="bidirectional")
    assert build_encoder(recipe, tmp_path / "asked").attention == "bidirectional"
    (folder / TRAINED_FILE).write_text('{"attention": "sideways"}')
    with pytest.raises(DescriptionError, match=r"has the attention 'sideways': it is one of bidirectional, causal"):
        build_encoder(recipe_from("tiny", **parts, adapters=[str(folder)]), tmp_path / "wrong")


def test_a_second_stage_attends_as_the_first_did(tmp_path: Path) -> None:
    mntp = run("mntp", tmp_path, bidirectional=False, max_steps=2)
    second = run("simcse", tmp_path, max_steps=2, peft_model_name_or_path=str(mntp))
    recipe = recipe_from("tiny", base=str(tmp_path / "base"), adapters=[str(mntp), str(second)], dtype="float32")
    assert build_encoder(recipe, tmp_path / "encoder").attention == "causal"


def describe(base: Path, *modules: str) -> Path:
    """A base that sentence-transformers' files describe as causal, with last-token pooling and prompts of its own."""
    save_base(base)
    kinds = ["Transformer", "Pooling", *modules]
    places = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    entries = [
        {"idx": n, "name": str(n), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    (base / "modules.json").write_text(json.dumps(entries))
    for place in places[1:]:
        (base / place).mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    (base / "config_sentence_transformers.json").write_text('{"prompts": {"query": "Query:"}}')
    return base


@pytest.mark.parametrize("changes", [{}, {"bidirectional": True, "pooling_mode": "mean"}])
def test_an_encoder_that_is_trained_further_stays_what_it_is(changes: dict[str, Any], tmp_path: Path) -> None:
    """Its files say how it attends and pools and where its prompts stand, unless the configuration says otherwise; and
    the trainer's own vectors are those of the encoder that `build` makes."""
    base = describe(tmp_path / "base")
    folder = run("supervised", tmp_path, **changes, max_steps=3, save_strategy="no")
    manifest = build_encoder(
        recipe_from("tiny", base=str(base), adapters=[str(folder)], dtype="float32"), tmp_path / "encoder"
    )
    asked = ("bidirectional", "mean") if changes else ("causal", "last_token")
    assert (manifest.attention, manifest.pooling) == asked
    assert (manifest.skip_instruction, manifest.template.lead) == (False, VERBATIM)
    assert (manifest.query_instruction, manifest.prompts) == ("Query:", {"query": "Query:"})

    encoder = Encoder.load(tmp_path / "encoder", device="cpu", dtype="float32")
    given = texts(9)
    rows = TextTokenizer.load(tmp_path / "encoder", manifest).encode_batch(given, [""] * len(given))
    served = normalized(encoder.encode(PackedBatch.pack(rows, manifest.pooling)))
    again = {**changes, "overwrite_output_dir": True}
    config = parse_config("supervised", tiny_config("supervised", tmp_path, **again))
    arguments = training_arguments(config)
    with resolve(str(base)) as source:
        trainer = prepare(config, arguments, read_examples(config, arguments), source, ())
    trainer._load_from_checkpoint(str(folder))
    trainer.model.eval()
    with torch.no_grad():
        assert (served - torch.from_numpy(trainer.encode(given))).abs().max() < 1e-5


def test_what_an_encoder_can_not_be_trained_for_is_said(tmp_path: Path) -> None:
    base = describe(tmp_path / "base", "Dense")
    layer = {"in_features": 64, "out_features": 8, "bias": False, "activation_function": "torch.nn.Identity"}
    (base / "2_Dense" / "config.json").write_text(json.dumps(layer))
    save_file({"linear.weight": torch.ones(8, 64)}, base / "2_Dense" / "model.safetensors")
    with pytest.raises(TrainingConfigError, match="has linear layers behind pooling, which training would leave out"):
        run("simcse", tmp_path)
    (tmp_path / "other").mkdir()
    describe(tmp_path / "other" / "base")
    with pytest.raises(TrainingConfigError, match="set bidirectional true, or false for MNTP with causal attention"):
        run("mntp", tmp_path / "other")
    both = run("mntp", tmp_path / "other", bidirectional=True, max_steps=2, overwrite_output_dir=True)
    recipe = recipe_from("tiny", base=str(tmp_path / "other" / "base"), adapters=[str(both)], dtype="float32")
    manifest = build_encoder(recipe, tmp_path / "encoder")
    assert (manifest.attention, manifest.pooling) == ("bidirectional", "last_token")


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("mntp", {"max_seq_length": 5000}, "max_seq_length is 5000, but .* reads 512 tokens: lower it"),
        ("mntp", {"mask_token_type": "mask"}, 'no token for mask_token_type "mask": use one of blank, eos, mask'),
        ("mntp", {"per_device_train_batch_size": 100}, "64 examples don't fill a batch of 100"),
        ("simcse", {"eval_strategy": "steps", "eval_steps": 2}, "evaluation is asked for, but nothing is held out"),
        ("simcse", {"peft_model_name_or_path": "nowhere"}, "'nowhere' is no folder and no hub id"),
    ],
)
def test_what_can_not_be_run_is_refused_before_it_begins(
    stage: Stage, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        run(stage, tmp_path, **changes)


def test_all_losses_together_learn_and_the_encoder_knows_its_widths(tmp_path: Path) -> None:
    """Of queries with one or two positives and one to three negatives, each with its score."""
    given = tiny_config("supervised", tmp_path, **EVERY_LOSS, max_steps=40, save_strategy="no", lora_dropout=0.0)
    write_scored(Path(given["train_file"]))
    folder = train(parse_config("supervised", {**given, "validation_split_percentage": 20, "do_eval": True}))
    found = losses(folder)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])
    recipe = recipe_from("tiny", base=str(tmp_path / "base"), adapters=[str(folder)], dtype="float32")
    assert build_encoder(recipe, tmp_path / "encoder").widths == (16, 32, 64)


def test_a_width_beyond_the_base_s_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingConfigError, match=r"matryoshka_dims has 65, but the vectors of .* have 64 dimensions"):
        run("simcse", tmp_path, matryoshka_dims=[65, 16])
    run("simcse", tmp_path, matryoshka_dims=[32], max_steps=1, overwrite_output_dir=True)
    assert "matryoshka_dims lacks the whole width, 64" in capsys.readouterr().out


def test_the_command_tells_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tiny_config("mntp", tmp_path) | {"train_file": str(tmp_path / "data.jsonl")}
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert main(["train", "mntp", str(tmp_path / "config.json")]) == 1
    expected = f"llm2vec-service: {tmp_path / 'data.jsonl'}, line 2: a text must be a string, not int (7)\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_dataset_is_read_by_its_name(tmp_path: Path) -> None:
    """Of a folder here, which `datasets` reads as it does one on the hub."""
    given = tiny_config("mntp", tmp_path, max_steps=2, do_eval=True, dataset_name=str(tmp_path / "set"))
    (tmp_path / "set").mkdir()
    write_texts(tmp_path / "set" / "train.txt")
    write_texts(tmp_path / "set" / "validation.txt", 8)
    del given["train_file"]
    assert len(losses(train(parse_config("mntp", given | {"cache_dir": str(tmp_path / "cache")})))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingDataError, match=r"empty could not be fetched .* or give its texts as train_file"):
        train(
            parse_config(
                "mntp", given | {"dataset_name": str(tmp_path / "empty"), "output_dir": str(tmp_path / "other")}
            )
        )


def test_blocks_of_texts_are_trained_on(tmp_path: Path) -> None:
    folder = run("mntp", tmp_path, line_by_line=False, max_steps=2)
    assert len(losses(folder)) == 2
