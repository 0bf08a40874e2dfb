"""The in-memory form and its decoders' data, without Triton."""

import dataclasses

import pytest
import torch
from cost_model import LAYOUTS
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels import ops
from precalib_kernels.backends.triton.decode_ptx import assembler, constraints, table_words
from precalib_kernels.backends.triton.launch_configs import Blocks, blocks_for, family_of, splits
from precalib_kernels.backends.triton.memory_layout import reason_against, triton_layout
from precalib_kernels.backends.triton.repack import repack, stored_codes
from precalib_kernels.errors import FormatError
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.reference import codebook_index


def decoded(fields: torch.Tensor, carry: torch.Tensor, form) -> torch.Tensor:
    """Trellis levels of one group, code by code as the assembler's comments say."""
    top, mask = form.bits - 1, 2**form.bits - 1
    levels = []
    kept = 1 << top if form.bits == 5 else mask  # what enters the codes that follow
    for pair in range(8):
        shift = pair + pair // 4 * 4
        twice = (int(carry) & 0xFFFF) * 0x10001
        two, one = ((twice >> first + min(form.bits, 4) - shift) & 1 for first in (23, 27))
        two, one = two << top, one << top
        for tile in range(form.chain_tiles):
            for code in range(8):
                stored = int(fields[4 * tile + code // 2, 2 * pair + code % 2])
                byte = form.table[(stored ^ one ^ two) & mask]
                negated = one >> top & 1
                levels.append((127 - byte if negated else byte) * 2 - 127)
                two, one = one, stored & kept
    return torch.tensor(levels)


@pytest.mark.parametrize("name", ["balanced-5", "balanced-4", "balanced-3", "balanced-2"])
@pytest.mark.parametrize("group", [64, 128])
def test_a_stored_trellis_is_the_reference(name, group):
    layout = dataclasses.replace(LAYOUTS[name], group_size=group)
    form = triton_layout(layout)
    codes = torch.randint(0, 2**layout.bits, (3, 256), dtype=torch.uint8)
    fields, carry = stored_codes(codes, form)
    expected = torch.tensor(layout.codebook)[codebook_index(codes, layout).int()]
    for row in range(3):
        for g in range(256 // group):
            dots = fields[row, g * group // 16 : (g + 1) * group // 16]
            levels = decoded(dots, carry[row, g], form)
            assert torch.equal(levels, expected[row, g * group : (g + 1) * group])


@pytest.mark.parametrize(
    "name", ["balanced-5", "balanced-4", "balanced-3", "balanced-2", "paper-4"]
)
def test_costs_are_counted_for_what_the_recipes_make(name):
    assert LAYOUTS[name] == RECIPE_LAYOUTS[name]


def test_memory_is_close_to_the_file():
    """What fast decoding costs in bits: a word of data per group and unpacked salient weights."""
    limits = {"balanced-5": 0.37, "balanced-4": 0.37, "balanced-3": 0.63, "balanced-2": 0.63}
    limits |= {"uniform-4": 0.32, "paper-4": 0.75}
    for name, most in limits.items():
        layout = LAYOUTS[name]
        more = triton_layout(layout).bits_per_weight(4096) - layout.bits_per_weight(4096, 4096)
        assert 0 < more < most


@pytest.mark.parametrize(
    ("change", "placed"),
    [
        ({}, True),
        ({"salient_count": 7}, True),
        ({"salient_count": 6}, False),
        ({"group_size": 32, "salient_count": 3}, True),
        ({"group_size": 32, "salient_count": 2}, False),
        ({"bits": 3, "salient_bits": 3}, True),
        ({"bits": 2, "salient_bits": 2}, False),
        ({"salient_bits": 8}, False),
        ({"salient_grid": "sign-magnitude"}, False),
        ({"scale": "log8"}, False),
        ({"codebook": tuple(range(-120, 121, 16))}, True),
        ({"codebook": tuple(range(-63, 65, 8))}, True),
        ({"codebook": (-128, *range(-101, 39, 10), 127)}, False),  # neither odd, even nor narrow
        ({"codebook": tuple(range(-31, 32, 2)), "trellis": True}, False),
    ],
)
def test_many_salient_weights_stay_in_place(change, placed):
    """And where both ways can be taken, the one that needs less memory is."""
    layout = dataclasses.replace(LAYOUTS["paper-4"], **change)
    form = triton_layout(layout)
    assert form.inline_salient == placed
    assert form.slots == (0 if placed else layout.salient_count)
    other = triton_layout(dataclasses.replace(layout, salient_bits=8)).bits_per_weight(4096)
    assert not placed or form.bits_per_weight(4096) < other


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_size": 96}, "groups of 96"),
        ({"group_size": 32}, "a trellis in groups of 32"),
        ({"codebook": tuple(range(-16, 16))}, "odd and symmetric"),
    ],
)
def test_layouts_without_a_kernel_are_refused_with_the_reason(change, reason):
    assert reason in reason_against(dataclasses.replace(LAYOUTS["balanced-4"], **change))


def test_wrong_arrays_are_refused():
    layout = Layout(4, 128)
    tensors = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        for name, spec in layout.tensors(8, 128).items()
    }
    arrays = repack(tensors, layout, 128, [8])
    packed = [arrays[name] for name in ops.array_order(layout)]
    text = layout.to_text()
    fake = torch.ops.precalib.gpu_linear
    with pytest.raises(FormatError, match="arrays of the in-memory form, expected"):
        fake(torch.zeros(1, 128), packed[:-1], None, [8], text)
    with pytest.raises(FormatError, match="'qweight' is "):
        fake(torch.zeros(1, 256), packed, None, [8], text)
    torch.library.opcheck(
        fake.default, (torch.zeros(0, 128), packed, None, [8], text), test_utils="test_faketensor"
    )


def test_programs_share_all_steps():
    blocks = Blocks(64, 16, 2, 4, 4)
    for tiles, steps in ((64, 32), (448, 32), (1, 1), (3, 7), (1000, 5)):
        count = splits(blocks, tiles, 1, steps, 132)
        share = -(-steps // count)
        assert (count - 1) * share < steps <= count * share


def test_architectures_have_entries_of_their_own():
    targets = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_120": "cuda", "gfx942": "hip"}
    assert {target: family_of(target) for target in targets} == targets
    assert blocks_for("sm_80", 64, 128) != blocks_for("cuda", 64, 128)


def test_every_row_count_has_a_kernel_or_is_dequantized():
    assert blocks_for("cuda", 1, 128).block_m == 8
    assert blocks_for("cuda", 17, 128).block_m == 32
    assert blocks_for("cuda", 17, 256).stages < blocks_for("cuda", 17, 128).stages
    assert [blocks_for("sm_80", 64, step).registers for step in (128, 256)] == [252, 254]
    assert [blocks_for("sm_89", 64, step).registers for step in (128, 256)] == [248, 248]
    assert blocks_for("cuda", 257, 128) is None


def test_assembler_names_every_operand():
    for layout in LAYOUTS.values():
        form = triton_layout(layout)
        operands = len(constraints(form).split(","))
        text = assembler(form)
        assert all(f"${i}" in text for i in range(operands))
        assert f"${operands}" not in text
        assert all(word < 2**32 for word in table_words(form))
