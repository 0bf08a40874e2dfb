"""Backend `reference`: the reference, a few rows at a time."""

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS, random_packed

from precalib_kernels.backends import reference as backend
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.reference import ReferenceBackend, unpacked_rows
from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference


def fused(layout, sizes, columns):
    """Packed tensors of shards with column scales of their own, and the weight they mean."""
    parts = [random_packed(layout, rows, columns, seed=rows).tensors for rows in sizes]
    weight = torch.cat([reference.dequantize(part, layout, columns) for part in parts])
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, weight


@pytest.mark.parametrize("name", RECIPE_LAYOUTS)
def test_unpacking_in_pieces_changes_nothing(monkeypatch, name):
    layout, sizes = RECIPE_LAYOUTS[name], (48, 17, 1)
    tensors, weight = fused(layout, sizes, 160)
    monkeypatch.setattr(backend, "CHUNK_WEIGHTS", 5 * 160)
    spec = LinearSpec(layout, 160, sizes, torch.float32, "cpu")
    pieces = list(unpacked_rows(tensors, spec, "fc"))
    assert max(rows.stop - rows.start for rows, _ in pieces) == 5
    assert torch.equal(torch.cat([values for _, values in pieces]), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_from_the_tensors_of_the_file(as_layer, dtype):
    layout, sizes = RECIPE_LAYOUTS["balanced-4"], (16, 8)
    tensors, weight = fused(layout, sizes, 160)
    made = ReferenceBackend(LinearSpec(layout, 160, sizes, dtype, "cpu"))
    layer = as_layer(made, tensors)
    assert {name for name, _ in layer.named_parameters()} == set(tensors)
    x, bias = torch.randn(2, 3, 160).to(dtype), torch.randn(24).to(dtype)
    expected = torch.nn.functional.linear(x.float(), weight, bias.float()).to(dtype)
    assert torch.equal(made.apply(layer, x, bias), expected)


def test_damaged_positions_are_refused():
    layout = RECIPE_LAYOUTS["balanced-4"]
    tensors = random_packed(layout, 16, 160).tensors
    tensors["salient"][-1] = 255
    made = ReferenceBackend(LinearSpec(layout, 160, (16,), torch.float32, "cpu"))
    with pytest.raises(FormatError, match=r"^fc: 'salient' names a weight outside"):
        made.prepare(tensors, "fc")
