"""Recipes: the shipped ones are valid, others are refused with their file and key."""

import pytest
from project import ROOT

from fisherfold.inputs.recipes import CorpusRecipe, ModelRecipe, QuestionsRecipe, find_recipe, recipe_names
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

PROJECT = Workspace(ROOT)
KINDS = {"models": ModelRecipe, "corpora": CorpusRecipe, "questions": QuestionsRecipe}
SHIPPED = [(kind, name) for kind in KINDS for name in recipe_names(PROJECT, kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_shipped_recipe_is_valid(kind, name):
    recipe = find_recipe(PROJECT, kind, name, KINDS[kind])
    assert recipe.licence and recipe.source.startswith("https://")


def test_defaults_name_shipped_recipes():
    params = PrepareParams()
    assert {("models", params.model), ("corpora", params.corpus), ("questions", params.questions)} <= set(SHIPPED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("licence: [", "not valid YAML"),
        ("description: x", "file: field required"),
        (
            "{description: x, licence: x, source: x, file: {name: ../x, bytes: 1, sha256: aa, packages: []}}",
            "file.name: string should match",
        ),
        (
            "{description: x, licence: x, source: x, file: {name: x, bytes: 1, sha256: aa, packages: "
            "[{name: --index-url, version: '1', member: x}]}}",
            "packages.0.name: string should match",
        ),
    ],
)
def test_invalid_recipe_is_named(tmp_path, text, message):
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "models" / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=r"mine.yaml") as error:
        find_recipe(Workspace(tmp_path), "models", "mine", ModelRecipe)
    assert message in str(error.value)
