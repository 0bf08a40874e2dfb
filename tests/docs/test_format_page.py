"""docs/format.md says what `Layout` says."""

import dataclasses
import itertools
import math

import pytest
import torch

from offline_quantize.method.recipes import RECIPES
from precalib_kernels.format.layout import (
    JSON_NAMES,
    MAX_GROUP_SIZE,
    MAX_SALIENT_COUNT,
    MAX_SALIENT_SLOTS,
    Layout,
)

PRESENT = {
    "always": lambda layout: layout.bits > 0,
    'scale "float16"': lambda layout: layout.scale == "float16",
    'scale "log8"': lambda layout: layout.scale == "log8",
    "uniform codebook": lambda layout: layout.uniform,
    "m > 0": lambda layout: layout.salient_count > 0,
    'm > 0 and salient grid not "row"': lambda layout: (
        layout.salient_count > 0 and layout.salient_grid != "row"
    ),
    "column scale": lambda layout: layout.column_scale,
}
TYPES = {"uint8": torch.uint8, "float16": torch.float16}
CODEBOOKS = {None: {}, "table": {"codebook": True}, "trellis": {"codebook": True, "trellis": True}}


def layouts():
    kinds = itertools.product(
        (2, 3, 4, 5),
        (32, 128),
        CODEBOOKS.values(),
        ("float16", "log8"),
        (0, 3),
        ("row", "sign-magnitude", "min-max"),
        (False, True),
    )
    for bits, group_size, codes, scale, count, grid, column_scale in kinds:
        if grid == "row" and count and scale != "log8":
            continue
        codes = dict(codes)
        if codes.get("codebook"):
            size = 2 ** (bits + codes.get("trellis", False))
            codes["codebook"] = tuple(range(1, size + 1))
        yield Layout(
            bits,
            group_size,
            **codes,
            scale=scale,
            salient_count=count,
            salient_bits=max(bits, 7),
            salient_grid=grid,
            column_scale=column_scale,
        )


def test_the_table_of_tensors(tables):
    rows = tables("format.md", "Tensors")[0]
    n, k = 24, 160
    for layout in layouts():
        sizes = {
            "N": n,
            "1": 1,
            "K": k,
            "G": layout.groups(k),
            "K·b/8": k * layout.bits // 8,
            "G·S": layout.groups(k) * layout.salient_bytes,
        }
        page = {}
        for name, dtype, shape, present in rows:
            if PRESENT[present](layout):
                assert name not in page
                page[name.strip("`")] = (
                    tuple(sizes[part] for part in shape.strip("[]").split(", ")),
                    TYPES[dtype],
                )
        assert page == layout.tensors(n, k)


def test_the_table_of_fields(tables):
    rows = {row[0].strip("`"): row for row in tables("format.md", "Fields of a layout")[0]}
    fields = {JSON_NAMES.get(f.name, f.name): f for f in dataclasses.fields(Layout)}
    assert list(rows) == list(fields)
    shown = {dataclasses.MISSING: "required", None: "none: uniform", True: "true", False: "false"}
    for name, field in fields.items():
        default = field.default
        if isinstance(default, bool) or default in (None, dataclasses.MISSING):
            expected = shown[default]
        else:
            expected = f'"{default}"' if isinstance(default, str) else str(default)
        assert rows[name][2] == expected
    assert rows["group_size"][1] == f"multiple of 32, at most {MAX_GROUP_SIZE}"
    most = f"0 … {MAX_SALIENT_COUNT}, and g·m at most {MAX_SALIENT_SLOTS}"
    assert rows["salient_count"][1] == most


def test_the_formulas_of_sizes():
    n, k = 96, 1280
    for layout in layouts():
        g, m, b, s = layout.group_size, layout.salient_count, layout.bits, layout.salient_bits
        rank_bits = math.ceil(math.log2(sum(math.comb(g, j) for j in range(m + 1))))
        size = math.ceil((rank_bits + m * (s - b)) / 8) if m else 0
        row_tensors = (layout.scale == "log8") + 2 * (m > 0 and layout.salient_grid != "row")
        bits = (
            b
            + (16 if layout.scale == "float16" else 8) / g
            + (8 / g if layout.uniform else 0)
            + 8 * size / g
            + row_tensors * 16 / k
            + (16 / n if layout.column_scale else 0)
        )
        assert layout.bits_per_weight(n, k) == pytest.approx(bits, rel=1e-12)


def test_the_effective_bits_of_the_recipes(tables):
    page = {row[0].strip("`"): row[1] for row in tables("format.md", "Effective bits")[0]}
    bits = {name: r.layout.bits_per_weight(4096, 4096) for name, r in RECIPES.items()}
    assert page == {name: f"{value:.3f}" for name, value in bits.items()}
