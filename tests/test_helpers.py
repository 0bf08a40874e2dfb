"""What tests take for granted about their helpers."""

from packed_tensors import RECIPE_LAYOUTS

from offline_quantize.method.recipes import RECIPES


def test_layouts_are_those_of_the_recipes():
    assert {name: recipe.layout for name, recipe in RECIPES.items()} == RECIPE_LAYOUTS
