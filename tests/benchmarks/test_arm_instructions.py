"""Counting instructions: loops of disassembled code, and one build of the kernels."""

import arm_emulator
import pytest

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.backends.arm import library

LISTING = """
0000000000000000 <outer(int)>:
   0:\tmov\tx0, #0x0
   4:\tadd\tx0, x0, #0x1
   8:\tsdot\tv0.4s, v1.16b, v2.4b[0]
   c:\tsmmla\tv0.4s, v1.16b, v2.16b
  10:\tcmp\tx0, #0x8
  14:\tb.ne\t8 <outer(int)+0x8>  // b.any
  18:\tcbnz\tx1, 4 <outer(int)+0x4>
  1c:\tb\t24 <outer(int)+0x24>
  20:\tnop
  24:\tret

0000000000000028 <straight>:
  28:\ttbl\tv0.16b, {v1.16b, v2.16b}, v3.16b
  2c:\tb\t0 <outer(int)>
"""


def test_loops_are_innermost_and_within_a_function(load):
    (loop,) = load("arm_instructions").loops(LISTING)
    assert loop.function == "outer(int)"
    assert loop.counts == {"sdot": 1, "smmla": 1, "cmp": 1, "b.ne": 1}
    assert loop.instructions == 4
    assert loop.products == 16 + 32


@pytest.mark.slow
def test_the_kernels_are_counted(load, tmp_path):
    found = arm_emulator.tools()
    if isinstance(found, str):
        pytest.skip(found)
    counting = load("arm_instructions")
    if not found.emulator or counting.EMULATOR not in found.emulator[0]:
        pytest.skip("there is no Arm emulator of that name")
    build = counting.Build(library.DOTPROD, None, tmp_path)
    layout = RECIPES["balanced-4"].layout
    inner, executed = build.inner_loops(layout, 1), build.executed("precalib", 1, layout)
    # SDOT, look-up and index of 16 weights take 2 + 1 + 4 instructions; salient weights come on top
    assert 7 / 16 < inner < 0.65
    assert inner < executed < 1.2
