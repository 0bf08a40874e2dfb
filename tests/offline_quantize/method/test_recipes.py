import dataclasses
import json

import pytest

from offline_quantize.method.recipes import DEFAULT, RECIPES, Recipe, adjust, find
from precalib_kernels.errors import FormatError, RecipeError
from precalib_kernels.format.layout import Layout


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes(name):
    recipe = find(name)
    assert recipe.layout.bits == int(name[-1])
    assert adjust(recipe) == recipe
    fields = json.loads(json.dumps(recipe.to_dict()))
    assert Layout.from_dict(fields["layout"]) == recipe.layout
    assert recipe.layout.bits_per_weight(4096, 4096) < recipe.layout.bits + 1


def test_the_names():
    assert DEFAULT == "balanced-4"
    families = ("balanced", "paper", "rtn")
    expected = {f"{name}-{bits}" for name in families for bits in (3, 4)}
    expected |= {"balanced-2", "balanced-5"}
    assert set(RECIPES) == expected
    with pytest.raises(RecipeError, match=r"unknown recipe 'x'; there are balanced-4, balanced-3"):
        find("x")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bits_and_group_sizes(name, bits, group_size):
    layout = adjust(find(name), bits=bits, group_size=group_size).layout
    assert (layout.bits, layout.group_size) == (bits, group_size)
    if find(name).rule == "group":
        share = layout.salient_count / group_size
        assert share == pytest.approx(find(name).alpha, abs=0.6 / group_size)


def test_a_share_becomes_places():
    assert adjust(find("balanced-4"), alpha=0.05).layout.salient_count == 6
    assert adjust(find("paper-4"), alpha=0.05).layout.salient_count == 12
    assert adjust(find("paper-4"), alpha=0.5).layout.salient_count == 32
    assert adjust(find("balanced-4"), alpha=0).layout.salient_count == 0


def test_values_that_do_not_exist():
    with pytest.raises(RecipeError, match=r"alpha is 1\.5, it must be"):
        dataclasses.replace(find("rtn-4"), alpha=1.5)
    with pytest.raises(RecipeError, match=r"--clip 2: give a share above 0 and up to 1"):
        adjust(find("paper-4"), clip=2)
    with pytest.raises(RecipeError, match=r"clip applies to min-max grids"):
        adjust(find("balanced-4"), clip=0.9)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_from_json(name):
    recipe = find(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("change", [{"layout": {"bits": 9}}, {"layout": None}, {"new": 1}])
def test_damaged_recipes(change):
    with pytest.raises(FormatError):
        Recipe.from_dict(find("rtn-4").to_dict() | change)
    with pytest.raises(FormatError, match="layout"):
        Recipe.from_dict({})


def test_files_call_a_field_by_its_first_name():
    fields = find("balanced-4").to_dict()
    assert fields["balance"] == 4
    assert list(fields) == ["about", "layout", "rule", "alpha", "clip", "balance"]
    for change in ("text", None, [], {"sinkhorn_iterations": 4}):
        with pytest.raises(FormatError):
            Recipe.from_dict(fields | change if isinstance(change, dict) else change)
