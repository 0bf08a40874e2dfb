"""Everything that is made of packed tensors lies where they do: weights, rows, routes."""

import pytest
import torch
from no_default_device import NoDefaultDevice
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends import reference as reference_backend
from precalib_kernels.backends.routes import sorted_routes
from precalib_kernels.backends.triton.repack import repack


@pytest.mark.parametrize("name", RECIPE_LAYOUTS)
def test_arrays_and_rows_are_made_where_the_weight_is(make_packed, name):
    packed = make_packed(RECIPE_LAYOUTS[name], 70, 288)
    names = packed.layout.tensors(70, 288)
    tensors, text = [packed.tensors[name] for name in names], packed.layout.to_text()
    ids = torch.tensor([3, 69, 3])

    def made():
        rows = reference_backend.gather_rows(ids, tensors, 288, text, torch.bfloat16)
        arrays = repack(packed.tensors, packed.layout, 288, [70], "weight")
        return {**arrays, "rows": rows}

    with NoDefaultDevice():
        expected = made()
    with torch.device("meta"):  # whatever took its device from there could not be computed with
        found = made()
    for array, tensor in expected.items():
        assert torch.equal(found[array], tensor), array


def test_routes_are_made_where_the_choices_are():
    ids = torch.tensor([[0, 2], [2, -1]])
    with NoDefaultDevice():
        expected = sorted_routes(ids, 4, 8)
    with torch.device("meta"):
        found = sorted_routes(ids, 4, 8)
    assert torch.equal(found.sorted, expected.sorted)
    assert torch.equal(found.expert_ids, expected.expert_ids)
    assert torch.equal(found.used, expected.used)
