"""The format: sizes, packing, refusals, and the frozen vector of version 1."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import pack_bits, unpack_bits
from precalib_kernels.format.layout import FORMAT_VERSION, Layout, eq13_bits
from precalib_kernels.format.salient_index import pack_salient, unpack_salient

VECTOR = Path(__file__).parent / "vectors" / "version-1.json"


def slow_stream(codes: list[int], bits: int) -> bytes:
    """Independent packer: the codes as one big number, the first one lowest."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_packing_is_one_little_endian_bit_stream(bits, values):
    codes = torch.tensor([value % 2**bits for value in values], dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert bytes(packed.tolist()) == slow_stream(codes.tolist(), bits)
    assert torch.equal(unpack_bits(packed, bits, len(codes)), codes)


def test_packing_keeps_leading_dimensions():
    codes = torch.randint(0, 8, (3, 4, 96), dtype=torch.uint8)
    packed = pack_bits(codes, 3)
    assert packed.shape == (3, 4, 36)
    assert torch.equal(packed[1, 2], pack_bits(codes[1, 2], 3))


def test_three_bits_are_dense():
    assert Layout(bits=3, group_size=128).tensors(8, 4096)["qweight"].shape == (8, 1536)


def test_paper_example_is_within_equation_13():
    # b = 4, alpha = 8 % (10 of 128), group 128, 4-bit salient codes: Eq. 13 says 4.81
    layout = Layout(4, 128, salient_count=10, salient_bits=4, salient_grid="min-max")
    assert round(eq13_bits(4, 128, 0.08), 2) == 4.81
    effective_bits = layout.bits_per_weight(4096, 4096)
    # by hand: codes 4, scale and zero 24/128, rank of ≤ 10 of 128 in 6 bytes, two row factors
    assert effective_bits == 4 + 24 / 128 + 48 / 128 + 32 / 4096
    assert effective_bits <= 4.81 + 0.05


@pytest.mark.parametrize("count", [0, 1, 2, 4, 10, 16, 32])
@pytest.mark.parametrize("group_size", [32, 64, 128, 96])
def test_rank_bits_are_the_fewest_that_tell_all_sets_apart(count, group_size):
    layout = Layout(4, group_size, salient_count=count, salient_bits=4)
    sets = sum(math.comb(group_size, size) for size in range(count + 1))
    assert 2 ** (layout.rank_bits - 1) < sets <= 2**layout.rank_bits or sets == 1


@pytest.mark.parametrize("columns", [32, 96, 128, 576, 4096 + 64])
@pytest.mark.parametrize("layout", RECIPE_LAYOUTS.values(), ids=list(RECIPE_LAYOUTS))
def test_stored_bytes_are_the_bytes_of_the_tensors(layout, columns, make_packed):
    packed = make_packed(layout, rows=3, columns=columns)
    layout.check(packed.tensors, columns, "test")
    total = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert layout.stored_bytes(3, columns) == total
    assert layout.bits_per_weight(3, columns) == 8 * total / (3 * columns)


def test_tensors_can_be_cut_at_rows_and_group_boundaries(make_packed):
    layout = RECIPE_LAYOUTS["balanced-3"]
    packed = make_packed(layout, rows=6, columns=512)
    whole = reference.dequantize(packed.tensors, layout, 512)
    cut = {}
    for name, tensor in packed.tensors.items():
        rows = tensor if tensor.shape[0] == 1 else tensor[2:5]
        width = tensor.shape[1]
        cut[name] = rows if width == 1 else rows[:, width // 4 : width * 3 // 4].contiguous()
    part = reference.dequantize(cut, layout, 256)
    assert torch.equal(part, whole[2:5, 128:384])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 6}, "bits must be 2, 3, 4 or 5"),
        ({"bits": 4.0}, "bits must be a whole number"),
        ({"group_size": 48}, "group_size must be a positive multiple of 32"),
        ({"group_size": 0}, "group_size must be a positive multiple of 32"),
        ({"salient_count": 33}, "salient_count must be between 0 and 32"),
        ({"salient_bits": 3}, "salient_bits must be between 4 and 8"),
        ({"salient_bits": 9}, "salient_bits must be between 4 and 8"),
        ({"salient_count": 1, "salient_grid": "row"}, 'needs scale "log8"'),
        ({"salient_grid": "cubic"}, "salient_grid must be"),
        ({"scale": "float8"}, "scale must be"),
        ({"codebook": (1, 2, 3)}, "levels must be 16 whole numbers"),
        ({"codebook": (0,) * 16}, "levels must not all be zero"),
        ({"codebook": (200, *range(15))}, "levels must be 16 whole numbers from -128 to 127"),
        ({"trellis": True}, "a trellis needs levels"),
        ({"trellis": True, "codebook": tuple(range(16))}, "levels must be 32 whole numbers"),
        ({"column_scale": 1}, "column_scale must be true or false"),
    ],
)
def test_a_layout_the_format_does_not_have_is_refused(fields, message):
    with pytest.raises(FormatError, match=message):
        Layout(**{"bits": 4, "group_size": 128} | fields)


def test_text_form_round_trips():
    for layout in RECIPE_LAYOUTS.values():
        assert Layout.from_text(layout.to_text()) == layout
    with pytest.raises(FormatError, match="'colour' is not known to format version 1"):
        Layout.from_dict({"bits": 4, "group_size": 64, "colour": "red"})
    with pytest.raises(FormatError, match="group_size"):
        Layout.from_dict({"bits": 4})


def test_check_names_the_tensor(make_packed):
    packed = make_packed(RECIPE_LAYOUTS["balanced-4"], 5, 160)
    for name in packed.tensors:
        rest = {k: v for k, v in packed.tensors.items() if k != name}
        with pytest.raises(FormatError, match=f"here: tensor '{name}' is missing"):
            packed.layout.check(rest, 160, "here")
        if name == "qweight":
            continue
        wrong = packed.tensors | {name: packed.tensors[name][:, :-1]}
        with pytest.raises(FormatError, match=f"here: tensor '{name}' is "):
            packed.layout.check(wrong, 160, "here")
    with pytest.raises(FormatError, match="'extra' does not belong"):
        packed.layout.check(packed.tensors | {"extra": torch.zeros(1)}, 160, "here")
    with pytest.raises(FormatError, match="must be a multiple of 32"):
        packed.layout.tensors(4, 100)


def test_version_1_is_frozen():
    """The exact bytes of a tiny weight in every kind of layout, and the values they stand for.

    If this fails, a checkpoint in somebody's hands changed its meaning: raise FORMAT_VERSION.
    """
    assert FORMAT_VERSION == 1
    cases = json.loads(VECTOR.read_text())
    assert len(cases) >= 7
    for case in cases:
        layout = Layout.from_dict(case["layout"])
        rows, columns = case["shape"]
        specs = layout.tensors(rows, columns)
        assert list(specs) == list(case["tensors"])
        tensors = {
            name: torch.frombuffer(bytearray.fromhex(text), dtype=specs[name].dtype).view(
                specs[name].shape
            )
            for name, text in case["tensors"].items()
        }
        values = reference.dequantize(tensors, layout, columns)
        expected = torch.tensor([float.fromhex(v) for v in case["values"]]).view(rows, columns)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
        codes = unpack_bits(tensors["qweight"], layout.bits, columns)
        assert torch.equal(pack_bits(codes, layout.bits), tensors["qweight"])
        if layout.salient_count:
            positions, high = unpack_salient(tensors["salient"], layout, columns, "vector")
            assert positions.tolist() == case["positions"]
            assert torch.equal(pack_salient(positions, high, layout), tensors["salient"])
