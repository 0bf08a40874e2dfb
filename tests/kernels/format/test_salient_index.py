"""Positions as combinatorial ranks: round trips, an independent slow coder, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precalib_kernels.errors import FormatError
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.salient_index import pack_salient, unpack_salient


def slow_number(chosen: list[int], high: list[int], layout: Layout) -> int:
    """Independent coder in Python's big integers."""
    rank = sum(math.comb(layout.group_size, size) for size in range(len(chosen)))
    rank += sum(math.comb(position, i) for i, position in enumerate(chosen, 1))
    extra = layout.salient_bits - layout.bits
    return rank | sum(h << (layout.rank_bits + i * extra) for i, h in enumerate(high))


@st.composite
def groups(draw):
    group_size = draw(st.sampled_from([32, 64, 96, 128, 256]))
    count = draw(st.integers(1, 32))
    bits = draw(st.sampled_from([2, 3, 4]))
    layout = Layout(bits, group_size, salient_count=count, salient_bits=draw(st.integers(bits, 8)))
    positions = st.integers(0, group_size - 1)
    chosen = sorted(draw(st.sets(positions, max_size=count)))
    top = 2 ** (layout.salient_bits - bits) - 1
    high = [draw(st.integers(0, top)) for _ in chosen]
    return layout, chosen, high


@given(groups())
def test_number_of_a_group_equals_the_slow_coder(case):
    layout, chosen, high = case
    empty = layout.salient_count - len(chosen)
    positions = torch.tensor([[chosen + [-1] * empty]])
    codes = torch.tensor([[high + [0] * empty]], dtype=torch.uint8)
    packed = pack_salient(positions, codes, layout)
    number = slow_number(chosen, high, layout)
    assert bytes(packed[0].tolist()) == number.to_bytes(layout.salient_bytes, "little")
    found, found_codes = unpack_salient(packed, layout, layout.group_size, "test")
    assert torch.equal(found.long(), positions)
    assert torch.equal(found_codes, codes)


def test_many_groups_round_trip(make_packed):
    layout = Layout(3, 128, salient_count=16, salient_bits=7)  # ranks of 67 bits: two limbs
    packed = make_packed(layout, rows=40, columns=576)
    positions, high = unpack_salient(packed.tensors["salient"], layout, 576, "test")
    assert torch.equal(positions, packed.positions)
    assert torch.equal(high, packed.high)


@pytest.mark.parametrize("count", [1, 2, 4, 10, 16])
def test_a_rank_beyond_the_last_set_is_refused(count):
    layout = Layout(4, 128, salient_count=count, salient_bits=4)
    sets = sum(math.comb(128, size) for size in range(count + 1))
    for number, valid in ((sets - 1, True), (sets, False), (2**layout.rank_bits - 1, False)):
        stored = number.to_bytes(layout.salient_bytes, "little")
        packed = torch.frombuffer(bytearray(stored), dtype=torch.uint8)[None]
        if valid:
            positions, _ = unpack_salient(packed, layout, 128, "test")
            assert positions[0, 0].tolist() == list(range(128 - count, 128))
        elif number != sets - 1:
            with pytest.raises(FormatError, match="test: 'salient' names a weight outside"):
                unpack_salient(packed, layout, 128, "test")


def test_a_position_past_a_ragged_group_is_refused():
    layout = Layout(4, 128, salient_count=2, salient_bits=4)
    positions = torch.tensor([[[5, 127], [3, 64]]])
    packed = pack_salient(positions, torch.zeros_like(positions, dtype=torch.uint8), layout)
    assert torch.equal(unpack_salient(packed, layout, 193, "t")[0].long(), positions)
    with pytest.raises(FormatError, match="names a weight outside its group"):
        unpack_salient(packed, layout, 192, "t")


@given(st.binary(min_size=9, max_size=9))
def test_any_bytes_give_positions_in_range_or_a_refusal(data):
    layout = Layout(4, 64, salient_count=4, salient_bits=8)
    stored = torch.frombuffer(bytearray(data[: layout.salient_bytes]), dtype=torch.uint8)[None]
    try:
        positions, _ = unpack_salient(stored, layout, 32, "fuzz")
    except FormatError:
        return
    used = positions[positions >= 0]
    assert bool((used < 32).all())
    assert len(used.unique()) == len(used)
