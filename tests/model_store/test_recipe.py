from __future__ import annotations

from pathlib import Path

import pytest

from model_store.architectures import ARCHITECTURES
from model_store.build.build import BuildError, build_encoder
from model_store.manifest import read_manifest
from model_store.recipe import RecipeError, load_recipe, packaged_recipes, read_recipe, recipe_from
from model_store.templates import Template, template_for
from service.cli import main
from tests.tiny import save_adapter, save_base, tiny_model


def test_packaged_recipes_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_recipe("demo").base == "demo:"
    assert main(["build", "--list"]) == 0
    listed = capsys.readouterr().out
    for name, recipe in packaged_recipes().items():
        assert recipe.name == name
        assert recipe.description
        assert recipe.parameters
        assert name in listed


def test_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'base = "org/base@abc"\nadapters = ["org/mntp", "org/simcse"]\npooling = "last_token"\n'
        '[template]\nprefix = "<s>"\nsuffix = "</s>"\nstrip = true\n'
    )
    recipe = load_recipe(str(file))
    assert recipe.name == "mine"
    assert recipe.adapters == ("org/mntp", "org/simcse")
    assert recipe.template == Template("<s>", "</s>", strip=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = ", "recipe r: Invalid value"),
        ("", "base: Field required"),
        ('base = "a"\nbasis = "b"', "basis: Extra inputs"),
        ('base = "a"\npooling = "cls"', "pooling: Input should be"),
        ('base = "a"\nmax_length = 0', "max_length"),
        ('base = "a"\nwidths = [64, 0]', "widths.1: Input should be greater than 0"),
        ('base = "a"\n[template]\nprefiks = "x"', "template.prefiks"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, "r")
    assert message in str(caught.value)


def test_a_name_that_is_no_recipe_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match="demo"):
        load_recipe("nonesuch")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("nonesuch.toml")


def test_a_recipe_s_file_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(b'\xef\xbb\xbfbase = "org/base"\n')
    assert load_recipe(str(tmp_path / "own.toml")).base == "org/base"
    (tmp_path / "latin.toml").write_bytes(b'description = "caf\xe9"\n')
    with pytest.raises(RecipeError, match=r"latin\.toml is not valid UTF-8"):
        load_recipe(str(tmp_path / "latin.toml"))


def test_the_fingerprint_covers_what_moves_a_vector() -> None:
    one = recipe_from("a", base="x")
    assert one.fingerprint == recipe_from("b", base="x", description="other words", evidence="none").fingerprint
    assert one.fingerprint != recipe_from("a", base="x", pooling="last_token").fingerprint
    assert one.fingerprint == recipe_from("a", base="x", widths=[]).fingerprint
    assert one.fingerprint[:16] == "68499c44807ec80a", "encoders that are built already would be built again"
    cut = recipe_from("a", base="x", widths=[64, 32, 64])
    assert cut.widths == (32, 64)
    assert one.fingerprint != cut.fingerprint == recipe_from("a", base="x", widths=[32, 64]).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "--recipe NAME, or --base REF and --out DIR"),
        (["build", "--base", "x"], "--out"),
        (["build", "--recipe", "demo", "--pooling", "mean"], "leave out pooling"),
        (["build", "--recipe", "demo", "--base", "x"], "needs --out DIR"),
        (["build", "--base", "/nowhere/at/all", "--out", "/tmp/never-made"], "no folder and no hub id"),
    ],
)
def test_build_says_what_it_needs(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_every_published_llm2vec_checkpoint_has_a_recipe() -> None:
    """Fourteen: MNTP alone, with SimCSE, with supervised training; Llama 3.1 has no SimCSE stage."""
    published = {name: recipe for name, recipe in packaged_recipes().items() if recipe.adapters and name != "demo"}
    assert len(published) == 14
    assert {recipe.evidence for recipe in published.values()} == {
        "LLM2Vec: tiny checkpoints of this layout compared with llm2vec 0.2.3"
    }
    for name, recipe in published.items():
        family, _, stage = name.rpartition("-")
        assert stage in ("mntp", "simcse", "supervised")
        mntp, *second = recipe.adapters
        assert mntp.startswith("McGill-NLP/LLM2Vec-")
        assert mntp.endswith("-mntp")
        assert second == ([] if stage == "mntp" else [f"{mntp}-{'unsup-simcse' if stage == 'simcse' else stage}"])
        assert recipe.template == template_for(recipe.base, "mean", ARCHITECTURES["llama"])
        assert (recipe.pooling, recipe.max_length, recipe.doc_max_length) == ("mean", 512, 400)
        assert recipe.gated == recipe.base.startswith("meta-llama/")
        assert recipe.parameters
        assert recipe.query_instruction
        assert f"{family}-mntp" in published


def test_a_second_stage_without_its_first_is_refused(tmp_path: Path) -> None:
    """Nothing in the adapter's own files says that another one comes before it."""
    save_base(tmp_path / "base")
    second = tmp_path / "LLM2Vec-Mistral-7B-Instruct-v2-mntp-supervised"
    first = tmp_path / "LLM2Vec-Mistral-7B-Instruct-v2-mntp"
    for seed, folder in enumerate((first, second)):
        save_adapter(folder, tiny_model("llama"), seed)
    for adapters in ([second], [second, first]):
        recipe = recipe_from("x", base=str(tmp_path / "base"), adapters=[str(folder) for folder in adapters])
        with pytest.raises(BuildError, match="--recipe mistral-7b-supervised"):
            build_encoder(recipe, tmp_path / "encoder")
    recipe = recipe_from("x", base=str(tmp_path / "base"), adapters=[str(first), str(second)])
    build_encoder(recipe, tmp_path / "encoder")


def test_a_recipe_s_base_can_be_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "copy")
    (tmp_path / "r.toml").write_text('base = "org/gated"\ndtype = "float32"\n')
    out = tmp_path / "encoder"
    assert (
        main(["build", "--recipe", str(tmp_path / "r.toml"), "--base", str(tmp_path / "copy"), "--out", str(out)]) == 0
    )
    assert read_manifest(out).base.reference == str(tmp_path / "copy")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".", "a/b", "a\\\\b", "a\\u0000b"])
def test_a_recipe_s_name_is_a_folder_s(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.toml").write_text(f'name = "{name}"\nbase = "x"\n')
    with pytest.raises(RecipeError, match="can't be a folder's name"):
        load_recipe(str(tmp_path / "own.toml"))
