from __future__ import annotations

from pathlib import Path

import pytest

from model_store.recipe import RecipeError, load_recipe, packaged_recipes, read_recipe, recipe_from
from model_store.templates import Template
from service.cli import main


def test_packaged_recipes_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_recipe("demo").base == "demo:"
    assert main(["build", "--list"]) == 0
    listed = capsys.readouterr().out
    for name, recipe in packaged_recipes().items():
        assert recipe.name == name
        assert recipe.description
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


def test_the_fingerprint_covers_what_moves_a_vector() -> None:
    one = recipe_from("a", base="x")
    assert one.fingerprint == recipe_from("b", base="x", description="other words").fingerprint
    assert one.fingerprint != recipe_from("a", base="x", pooling="last_token").fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "--recipe NAME, or --base REF and --out DIR"),
        (["build", "--base", "x"], "--out"),
        (["build", "--recipe", "demo", "--pooling", "mean"], "leave out pooling"),
        (["build", "--base", "/nowhere/at/all", "--out", "/tmp/never-made"], "no folder and no hub id"),
    ],
)
def test_build_says_what_it_needs(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
