"""What tests take for granted about their helpers."""

import ctypes

from packed_tensors import RECIPE_LAYOUTS
from sanitized_objects import compile_units, link_library

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.toolchain.compile import Unit, find_compiler


def test_layouts_are_those_of_the_recipes():
    assert {name: recipe.layout for name, recipe in RECIPES.items()} == RECIPE_LAYOUTS


def test_objects_are_kept_until_what_they_are_made_of_changes(tmp_path):
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    compiler = find_compiler()

    def answer(number):
        header.write_text(f"#define ANSWER {number}\n")
        objects = compile_units(compiler, [Unit(source, ("-fPIC",))], tmp_path / "objects")
        return objects, ctypes.CDLL(str(link_library(compiler, objects, ()))).answer()

    objects, first = answer(1)
    time = objects[0].stat().st_mtime_ns
    again, second = answer(1)
    assert again == objects
    assert objects[0].stat().st_mtime_ns == time
    assert (first, second, answer(2)[1]) == (1, 1, 2)
