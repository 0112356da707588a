from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.build.build import build_encoder
from model_store.build.self_test import self_test_difference
from model_store.build.verify import verify_encoder
from model_store.manifest import StoreError, changed_files, describe_files, read_manifest
from model_store.recipe import recipe_from
from service.cli import main
from tests.cuda_stand_in import Gpus, install
from tests.tiny import build_tiny, save_base


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "encoder"
    build_tiny(folder)
    return folder


@pytest.fixture
def encoder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "encoder"))


def problems(folder: Path) -> str:
    return "\n".join(problem for check in verify_encoder(folder) for problem in check.problems)


def reseal(folder: Path) -> None:
    """What somebody would do who changed a file and wanted it to pass: new hashes, a new manifest."""
    read_manifest(folder).model_copy(update={"files": describe_files(folder)}).sealed(folder).write(folder)


def test_a_whole_encoder_passes(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(encoder)]) == 0
    report = capsys.readouterr().out
    assert [line.split()[1] for line in report.splitlines()] == ["manifest:", "files:", "tensors:", "self-test:"]
    assert "FAILED" not in report


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def _add_file(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _drop_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"pooling": "mean"', '"pooling": "last_token"'))


def _break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _poison_and_reseal(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


def _reshape_and_reseal(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


def _change_and_reseal(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors: .* bytes, should be"),
        (_flip, "model.safetensors: content changed"),
        (_drop_tensor, "layers.1.mlp.up_proj.weight: missing"),
        (_add_file, "extra.bin: not part of this encoder"),
        (_break_config, "config.json: .* bytes, should be"),
        (_drop_file, "tokenizer.json: missing"),
        (_edit_manifest, "changed after it was written"),
        (_break_manifest, "can't|cannot be read"),
        (_drop_manifest, "not a stored encoder"),
        (_poison_and_reseal, "norm.weight: holds NaN or infinite"),
        (_reshape_and_reseal, r"norm.weight: shape \(3,\), should be \(64,\)"),
        (_change_and_reseal, "1 − cosine up to"),
    ],
)
def test_every_damage_is_found_and_named(encoder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(encoder)
    import re

    assert re.search(message, problems(encoder)), problems(encoder)
    assert main(["verify", str(encoder)]) == 1


def test_an_id_that_belongs_to_other_files_is_found(encoder: Path) -> None:
    read_manifest(encoder).model_copy(update={"embedding_space": "0123456789abcdef"}).write(encoder)
    assert problems(encoder) == "the embedding-space id does not belong to these files"


def test_a_foreign_folder_is_not_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web app", "icons": []}))
    assert "format" in problems(tmp_path)
    assert main(["verify", str(tmp_path / "nowhere")]) == 1


def test_show_prints_what_it_is(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(encoder)]) == 0
    shown = capsys.readouterr().out
    for fact in ("llama", "mean", "64", read_manifest(encoder).embedding_space):
        assert fact in shown


def rename_in_manifest(folder: Path, old: str, new: str) -> None:
    """As one would who wants it to pass: with the manifest's own hash made again."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("manifest_sha256")
    content["files"][new] = content["files"].pop(old)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "manifest_sha256": digest}))


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/passwd", "..", "sub/tokenizer.json", "a\\b", "a\0b"])
def test_a_manifest_can_not_name_files_elsewhere(encoder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    rename_in_manifest(folder, "tokenizer.json", name)
    with pytest.raises(StoreError, match="is not the name of a file in this folder"):
        read_manifest(folder)


def test_a_link_can_not_lead_out_of_the_folder(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert changed_files(folder, read_manifest(folder)) == ["tokenizer.json: a link that leads out of the folder"]


def test_a_readme_is_no_damage(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    (folder / "README.md").write_text("What this encoder is for.")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache").mkdir()
    assert not changed_files(folder, read_manifest(folder))
    (folder / "tokenizer.model").write_text("which a library may read")
    assert changed_files(folder, read_manifest(folder)) == ["tokenizer.model: not part of this encoder"]


def test_a_manifest_of_the_first_format_is_read(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for later in ("manifest_sha256", "attention", "document_instruction", "widths", "prompts", "default_prompt"):
        del content[later]
    for records in ([content["base"]], content["adapters"], [content["recipe"]]):
        for record in records:
            for later in ("content", "attention", "document_instruction", "widths", "ignored_config_keys"):
                record.pop(later, None)
    del content["template"]["lead"]
    content |= {"format": 1, "embedding_space": "0123456789abcdef"}  # which was made otherwise, and stays
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "manifest_sha256": digest}))
    first, second = read_manifest(folder), read_manifest(encoder)
    assert (first.attention, first.template) == ("bidirectional", second.template)
    assert (first.embedding_space, first.recipe) == ("0123456789abcdef", second.recipe)
    assert not problems(folder)


@pytest.mark.parametrize(("capability", "on_gpu"), [((9, 0), True), ((7, 5), False)])
def test_the_self_test_runs_on_a_gpu_that_computes_in_the_encoder_s_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], on_gpu: bool
) -> None:
    save_base(tmp_path / "base", "llama")
    install(Gpus(capability=capability), monkeypatch.setattr)
    with torch.profiler.profile() as done:
        build_encoder(recipe_from("encoder", base=str(tmp_path / "base")), tmp_path / "encoder")
    assert ("aten::_flash_attention_forward" in {event.key for event in done.key_averages()}) == on_gpu
    difference, allowed = self_test_difference(tmp_path / "encoder")
    assert difference <= allowed
