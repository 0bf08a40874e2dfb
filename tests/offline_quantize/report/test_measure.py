import pytest
import torch

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.safetensors_file import (
    TensorLocation,
    read_header,
    read_tensor,
)
from offline_quantize.report import measure
from offline_quantize.report.contents import kinds
from offline_quantize.report.table import strip
from precalib_kernels.format.reference import salient_codes

UP, DOWN = "layers.0.up_proj", "layers.0.down_proj"


@pytest.fixture
def packed(checkpoint, weights, quantize):
    """Two weights, the first with one special input column, by recipe."""

    def make(recipe):
        tensors = {f"{UP}.weight": weights()(96, 128), f"{DOWN}.weight": weights()(80, 160)}
        tensors[f"{UP}.weight"][:, 77] *= 100
        source = checkpoint(tensors=tensors, config={"num_hidden_layers": 1}, files={})
        return open_packed(quantize(source, "--recipe", recipe)), tensors

    return make


@pytest.mark.parametrize("recipe", ["balanced-4", "balanced-3", "paper-4"])
@pytest.mark.parametrize("rows", [1, 7, 1 << 20])
def test_positions_are_those_the_reference_decodes(packed, recipe, rows, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK_WEIGHTS", 128 * rows)
    checkpoint, _ = packed(recipe)
    for module in (UP, DOWN):
        height, width = checkpoint.shape(module)
        tensors, layout = checkpoint.tensors(module), checkpoint.layout(module)
        columns, _ = salient_codes(tensors, layout, width, module)
        expected = torch.zeros(height, width + 1, dtype=torch.int64).scatter_(1, columns, 1)[:, :-1]
        found = measure.positions(checkpoint, module)
        assert found.columns.equal(expected.sum(0))
        down, across = found.blocks.shape
        assert (down, across) == (32, 64)
        for i, j in ((0, 0), (5, 40), (31, 63)):
            part = [
                bool(expected[r, c])
                for r in range(height)
                for c in range(width)
                if r * down // height == i and c * across // width == j
            ]
            assert found.blocks[i, j] == pytest.approx(sum(part) / len(part))


def test_a_special_input_is_seen(packed):
    checkpoint, _ = packed("paper-4")
    found = measure.positions(checkpoint, UP)
    total = int(found.columns.sum())
    assert found.columns[77] == found.columns.max() > 5 * found.columns.float().mean()
    assert found.busiest() == pytest.approx(int(found.columns[77]) / total)
    assert measure.positions(checkpoint, DOWN).busiest() < found.busiest() / 2


def test_a_layout_without_salient_weights(packed):
    checkpoint, _ = packed("rtn-4")
    assert measure.positions(checkpoint, UP) is None
    found = measure.histogram(checkpoint, UP, None, 0.0)
    assert not found.salient.any()
    assert found.original_ordinary is None
    assert found.ordinary.sum() == 96 * 128


def test_histograms_hold_every_weight_once_and_by_class(packed):
    checkpoint, tensors = packed("paper-4")
    source = checkpoint.root.parent / "source" / "model.safetensors"
    entry = read_header(source)[0][f"{DOWN}.weight"]
    original = read_tensor(source, f"{DOWN}.weight", entry).float()
    assert original.equal(tensors[f"{DOWN}.weight"].float())
    error = float((original - checkpoint.weight(DOWN)).square().sum() / original.square().sum())
    found = measure.histogram(
        checkpoint, DOWN, TensorLocation(source, f"{DOWN}.weight", entry), error
    )
    assert found.largest == float(original.abs().max())
    salient = int(measure.positions(checkpoint, DOWN).columns.sum())
    assert found.salient.sum() == found.original_salient.sum() == salient > 0
    assert found.ordinary.sum() == found.original_ordinary.sum() == 80 * 160 - salient
    # λ' cuts a gap around zero out of the salient weights of the original
    middle = slice(measure.BINS // 2 - 2, measure.BINS // 2 + 2)
    assert found.original_salient[middle].sum() == 0
    assert found.original_ordinary[middle].sum() > 0


def test_layers_and_kinds():
    names = ["model.layers.3.mlp.up_proj", "model.layers.12.mlp.experts.7.w1", "model.layers.0"]
    assert list(kinds(names).values()) == [
        (3, "mlp.up_proj"),
        (12, "mlp.experts.*.w1"),
        (0, "weight"),
    ]
    assert kinds(["h.4.attn.c", "other"])["other"] == (-1, "other")
    both = kinds(["a.layers.1.x", "b.layers.2.x"])
    assert list(both.values()) == [(1, "a.x"), (2, "b.x")]


def test_the_strip_is_flat_for_even_columns_and_has_a_spike_for_a_special_one():
    even = torch.full((256,), 10)
    blocks = torch.zeros(1, 1)
    assert strip(None) == strip(measure.Positions(even * 0, blocks)) == ""
    flat = strip(measure.Positions(even, blocks))
    assert flat == "M0 16" + 64 * "V12h1" + "V16z"
    even[130] = 80
    assert strip(measure.Positions(even, blocks)) == (
        "M0 16" + 32 * "V14h1" + "V0h1" + 31 * "V14h1" + "V16z"
    )
    few = strip(measure.Positions(torch.tensor([0, 4, 0, 0]), blocks))
    assert few == "M0 16V16h16V0h16V16h16V16h16V16z"
