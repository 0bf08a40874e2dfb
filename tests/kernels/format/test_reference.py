"""The reference against a slow dequantizer that follows the format page weight by weight."""

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout

LAYOUTS = {
    **RECIPE_LAYOUTS,
    "uniform-2": Layout(2, 64),
    "table-4": Layout(4, 32, codebook=tuple(range(-120, 121, 16)), salient_count=3),
    "trellis-2": Layout(2, 64, codebook=TRELLIS_CODEBOOKS[2], trellis=True, column_scale=True),
    "uniform-log8": Layout(4, 64, scale="log8", salient_count=2, salient_grid="row"),
    "sign-magnitude-b": Layout(3, 128, salient_count=10, salient_bits=3),
    "min-max-8": Layout(3, 96, salient_count=5, salient_bits=8, salient_grid="min-max"),
}


def slow_dequantize(packed) -> torch.Tensor:
    layout, tensors = packed.layout, packed.tensors
    rows, columns = packed.shape
    result = torch.zeros(rows, columns, dtype=torch.float64)
    levels = layout.codebook or tuple(range(2**layout.bits))
    limit = 127 if layout.codebook else 2**layout.bits - 1
    for n in range(rows):
        for k in range(columns):
            g, inside = divmod(k, layout.group_size)
            code = int(packed.codes[n, k])
            slots = [] if packed.positions is None else packed.positions[n, g].tolist()
            if inside in slots:
                high = int(packed.high[n, g, slots.index(inside)])
                value = slow_salient(code + (high << layout.bits), n, layout, tensors)
            else:
                index = code
                if layout.trellis:
                    u1 = int(packed.codes[n, k - 1]) & 1 if inside > 0 else 0
                    u2 = int(packed.codes[n, k - 2]) & 1 if inside > 1 else 0
                    index = 2 * (code ^ u2) + u1
                level = levels[index] - (0 if layout.codebook else int(tensors["zeros"][n, g]))
                scale = float(tensors["scales"][n, g])
                if layout.scale == "log8":
                    row = float(tensors["row_scale"][n, 0])
                    scale = 0.0 if scale == 255 else row * 2 ** (-scale / 16)
                value = scale * level / limit
            factor = float(tensors["column_scale"][0, k]) if layout.column_scale else 1.0
            result[n, k] = value * factor
    return result


def slow_salient(code: int, n: int, layout: Layout, tensors) -> float:
    half = 2 ** (layout.salient_bits - 1)
    if layout.salient_grid == "row":
        return float(tensors["row_scale"][n, 0]) * (code - half) / (half - 1)
    scale, offset = (float(tensors[f"salient_{x}"][n, 0]) for x in ("scale", "offset"))
    if layout.salient_grid == "min-max":
        return offset + scale * code
    return (-1 if code >= half else 1) * (offset + scale * (code % half))


@pytest.mark.parametrize("columns", [32, 160, 288])
@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantize_equals_the_slow_reading_of_the_format(name, columns, make_packed):
    packed = make_packed(LAYOUTS[name], rows=3, columns=columns, seed=columns)
    values = reference.dequantize(packed.tensors, packed.layout, columns)
    torch.testing.assert_close(values.double(), slow_dequantize(packed), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["balanced-4", "paper-3", "rtn-3"])
def test_linear_is_within_rounding_of_the_exact_product(name, dtype, make_packed):
    packed = make_packed(LAYOUTS[name], rows=7, columns=288)
    x, bias = torch.randn(2, 3, 288).to(dtype), torch.randn(7).to(dtype)
    y = reference.linear(x, packed.tensors, packed.layout, bias)
    assert y.dtype == dtype
    weight = reference.dequantize(packed.tensors, packed.layout, 288).double()
    exact = x.double() @ weight.T + bias.double()
    bound = x.double().abs() @ weight.T.abs() + bias.double().abs()
    eps = 288**0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert bool(((y.double() - exact).abs() <= eps * bound).all())


def test_fused_parts_have_their_own_column_scale(make_packed):
    layout = LAYOUTS["balanced-4"]
    parts = [make_packed(layout, rows=rows, columns=160, seed=rows) for rows in (4, 2, 3)]
    fused = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    weight = reference.dequantize(fused, layout, 160, shard_sizes=[4, 2, 3])
    alone = [reference.dequantize(part.tensors, layout, 160) for part in parts]
    assert torch.equal(weight, torch.cat(alone))
    with pytest.raises(FormatError, match="column_scale has 3 rows for parts"):
        reference.dequantize(fused, layout, 160)
