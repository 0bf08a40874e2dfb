"""The operator of salient weights beside another kernel, as far as it goes without Triton."""

import pytest
import torch

from precalib_kernels.backends.triton import salient_op
from precalib_kernels.backends.triton.launch_configs import SPARSE_TABLE, sparse_blocks
from precalib_kernels.errors import FormatError
from precalib_kernels.format.layout import Layout

LAYOUT = Layout(4, 64, salient_count=2)


@pytest.fixture
def given(make_packed):
    tensors = make_packed(LAYOUT, 5, 160).tensors
    arrays = salient_op.salient_arrays(tensors, tensors["scales"] / 15, LAYOUT, 160)
    return [torch.zeros(3, 5), torch.zeros(3, 160), *arrays.values(), None, 64]


def test_a_salient_weight_takes_three_bytes(given):
    positions, values, unit = given[2:5]
    assert positions.shape == values.shape == (5, 3 * LAYOUT.salient_count)
    assert positions.element_size() + values.element_size() == 3
    assert unit.shape == (5,)


def test_unpacking_in_pieces_changes_nothing(make_packed, monkeypatch, given):
    tensors = make_packed(LAYOUT, 5, 160).tensors
    monkeypatch.setattr(salient_op, "CHUNK_WEIGHTS", 2 * 160)
    pieces = salient_op.salient_arrays(tensors, tensors["scales"] / 15, LAYOUT, 160)
    assert all(torch.equal(*pair) for pair in zip(pieces.values(), given[2:5], strict=True))


def test_damaged_positions_are_refused(make_packed):
    tensors = make_packed(LAYOUT, 5, 160).tensors
    tensors["salient"][-1] = 255
    with pytest.raises(FormatError, match=r"^fc: 'salient' names a weight outside"):
        salient_op.salient_arrays(tensors, tensors["scales"] / 15, LAYOUT, 160, "fc")


@pytest.mark.parametrize(
    ("place", "wrong", "text"),
    [
        (0, torch.zeros(2, 5), r"^y is \[2, 5\] torch.float32, expected \[3, 5\]"),
        (0, torch.zeros(3, 5).half(), r"^y is \[3, 5\] torch.float16, expected .* torch.float32"),
        (2, torch.zeros(5, 6), "^'salient_positions' is .* torch.float32, expected .* torch.uint8"),
        (2, torch.zeros(5, 0, dtype=torch.uint8), "^0 slots are no whole number for each of 3"),
        (3, torch.zeros(5, 9).half(), r"^'salient_values' is \[5, 9\] .*, expected \[5, 6\]"),
        (4, torch.zeros(4), r"^'salient_unit' is \[4\] .*, expected \[5\]"),
        (5, torch.zeros(4), r"^bias has shape \[4\], expected \[5\]"),
        (6, 32, "^6 slots are no whole number for each of 5 groups"),
    ],
)
def test_wrong_arrays_are_refused_and_faked_alike(given, place, wrong, text):
    given[place] = wrong
    with pytest.raises(FormatError, match=text):
        torch.ops.precalib.gpu_sparse(*given)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in given]
    with pytest.raises(FormatError, match=text):
        torch.ops.precalib.gpu_sparse(*meta)


def test_no_rows(given):
    given[:2] = torch.zeros(0, 5), torch.zeros(0, 160)
    assert torch.ops.precalib.gpu_sparse(*given).shape == (0, 5)
    torch.library.opcheck(torch.ops.precalib.gpu_sparse.default, tuple(given))


@pytest.mark.parametrize("rows", [1, 3, 8, 33, 70])
def test_columns_of_a_block_lie_in_one_piece(rows):
    blocks = sparse_blocks(rows)
    x = torch.randn(rows, 7)
    turned = salient_op.by_column(x, blocks)
    assert turned.is_contiguous()
    assert turned.shape == (-(-rows // blocks.block_m), 7, blocks.block_m)
    flat = turned.transpose(1, 2).reshape(-1, 7)
    assert torch.equal(flat[:rows], x)
    assert not flat[rows:].any()


def test_one_row_is_copied_from_odd_addresses_only():
    line = torch.randn(1, 65)
    assert salient_op.by_column(line, SPARSE_TABLE[0]).data_ptr() == line.data_ptr()
    assert salient_op.by_column(line[:, 1:], SPARSE_TABLE[0]).data_ptr() % 16 == 0


def test_every_row_count_has_blocks():
    assert [sparse_blocks(rows).block_m for rows in (1, 2, 8, 9, 17, 5000)] == [1, 8, 8, 16, 32, 32]
    assert salient_op.warm_up_rows() == [1, 8, 16, 32]
