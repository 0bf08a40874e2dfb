"""Where the high bits of codes go. What the kernels read from there: `test_products.py`."""

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.arm.memory_layout import ArmLayout, high_planes, repack
from precalib_kernels.backends.x86 import repack as x86_repack
from precalib_kernels.errors import FormatError


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("planes_of", [high_planes, x86_repack.high_planes], ids=["arm", "x86"])
def test_every_bit_of_every_step_has_a_place_of_its_own(bits, planes_of):
    places = set()
    for step in range(8):
        for bit in range(bits - 1):
            high = torch.zeros(8, 1, dtype=torch.uint8)
            high[step] = 1 << bit
            found = [int(plane) for plane in planes_of(high, bits)]
            ((plane, value),) = [(p, v) for p, v in enumerate(found) if v]
            assert value.bit_count() == 1
            places.add((plane, value))
    assert len(places) == 8 * (bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_only_planes_of_high_bits_differ_from_x86(make_packed, bits):
    layout = RECIPE_LAYOUTS[f"balanced-{bits}"]
    memory = ArmLayout(layout, 256, (32,))
    tensors = make_packed(layout, 32, 256).tensors
    arm, x86 = repack(tensors, memory, "here"), x86_repack.repack(tensors, memory, "here")
    sections = memory.offsets[0]
    assert torch.equal(arm[sections:], x86[sections:])
    groups = [packed[:sections].view(2, 2, bits, -1) for packed in (arm, x86)]
    assert torch.equal(groups[0][:, :, 0], groups[1][:, :, 0])  # the low bits
    assert not torch.equal(*groups)


def test_damaged_positions_are_refused(make_packed):
    layout = RECIPE_LAYOUTS["balanced-4"]
    tensors = make_packed(layout, 5, 160).tensors
    tensors["salient"] |= 255
    with pytest.raises(FormatError, match=r"^here: 'salient' names a weight outside its group"):
        repack(tensors, ArmLayout(layout, 160, (5,)), "here")
