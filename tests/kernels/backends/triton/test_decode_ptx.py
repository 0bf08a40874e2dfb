"""The decoders' PTX, run instruction by instruction, against what the codes stand for."""

import dataclasses
import re

import numpy
import pytest
import torch
from cost_model import LAYOUTS

from precalib_kernels.backends.triton.activation_kernel import dot_position
from precalib_kernels.backends.triton.decode_ptx import (
    assembler,
    constants,
    constraints,
    spare_assembler,
)
from precalib_kernels.backends.triton.memory_layout import SUBNORMAL, triton_layout
from precalib_kernels.backends.triton.repack import repack
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.reference import codebook_index, expand_groups, salient_codes

ONES = 2**32 - 1
PLANS = {
    **LAYOUTS,
    "uniform-2": Layout(2, 64),
    "table-2": Layout(2, 128, (-100, -30, 31, 100)),
    "table-3": Layout(3, 32, (-128, -90, -40, 0, 10, 50, 90, 127)),
    "trellis-3-64": dataclasses.replace(LAYOUTS["balanced-3"], group_size=64),
    "trellis-2-64": dataclasses.replace(LAYOUTS["balanced-2"], group_size=64),
    "trellis-5-64": dataclasses.replace(LAYOUTS["balanced-5"], group_size=64),
    "any-table-5": Layout(5, 64, (-128, *range(-111, 112, 8), -3, 103, 127)),
    "uniform-5-32": Layout(5, 32),
    "trellis-4-64": dataclasses.replace(LAYOUTS["balanced-4"], group_size=64),
    "paper-3": dataclasses.replace(LAYOUTS["paper-4"], bits=3, salient_bits=3),
    "paper-4-32": dataclasses.replace(LAYOUTS["paper-4"], group_size=32),
    "paper-table-3": dataclasses.replace(
        LAYOUTS["paper-table-4"],
        **{"bits": 3, "salient_bits": 3, "codebook": (-64, -30, -11, 0, 7, 12, 31, 63)},
    ),
    "paper-table-4-64": dataclasses.replace(LAYOUTS["paper-table-4"], group_size=64),
}


def lop3(a, b, c, table):
    result = 0
    for bit in range(8):
        if table >> bit & 1:
            result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return result & ONES


def prmt(a, b, selector):
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (nibble & 7) & 255
        result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return result


def fma(a, b, c):
    words = numpy.array([[a], [b], [c]], dtype=numpy.uint32)
    a, b, c = words.view(numpy.float16).astype(float)
    return int((a * b + c).astype(numpy.float16).view(numpy.uint32)[0])


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, n: a << n & ONES if n < 32 else 0,
    "shr.b32": lambda a, n: a >> n if n < 32 else 0,
    "shf.l.wrap.b32": lambda low, high, n: (high << 32 | low) << n % 32 >> 32 & ONES,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "fma.rn.f16x2": fma,
}


def run(text: str, outputs: int, inputs: list[int]) -> list[int]:
    """What the PTX leaves in its outputs."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in re.sub(r"[{}]", "", text).split(";"):
        operation, _, rest = statement.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        to, *given = (name.strip() for name in rest.split(","))
        values = [registers[name] if name in registers else int(name, 0) for name in given]
        registers[to] = OPERATIONS[operation](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def registers(elements: torch.Tensor) -> list[int]:
    """16 elements of two bytes as the eight registers that hold them."""
    return elements.contiguous().numpy().view(numpy.uint32).tolist()


def decoded(arrays, form, steps: int) -> torch.Tensor:
    """Halves [dots, 16] of the first row, by the assembler."""
    text, tiles, rows = assembler(form), form.chain_tiles, []
    for step in range(steps):
        words = [registers(tile) for tile in arrays["qweight"][step, :, 0]]
        plane = words.pop() if form.inline_salient or form.bits == 5 else None
        if form.bits < 4:
            spare = spare_assembler(form.bits)
            words.append([run(spare, 1, list(pair))[0] for pair in zip(*words, strict=True)])
        for chain in range(0, form.step // 64, tiles):
            group = (step * form.step + chain * 64) // form.group
            decoded = []
            for r in range(8):
                inputs = []
                if form.mode != "uniform":
                    low, high, ones, shift, *more = (row[r] for row in constants(form))
                    inputs = [low, high, *[ones] * (not form.inline_salient), *more]
                    inputs += [shift] * (form.mode == "trellis")
                if form.inline_salient:
                    lines = arrays["salient_affine"][group : group + 2, 0]
                    lines = lines[[0, 0, 1, 1] if form.group == 32 else [0] * 4].clone()
                    lines[1::2] *= torch.tensor([1, 16] if form.mode == "uniform" else [1 / 16, 1])
                    inputs.append(plane[r] << 2 * chain & ONES)
                    inputs += [registers(line.repeat(2))[0] for line in lines.flatten()]
                if form.mode == "trellis":
                    inputs.append((int(arrays["group_data"][group, 0]) >> 16 & 0xFFFF) * 0x10001)
                if form.bits == 5:
                    inputs.append(plane[r] << chain & ONES)
                inputs += [words[chain + j][r] for j in range(tiles)]
                assert len(constraints(form).split(",")) == 4 * tiles + len(inputs)
                decoded.append(run(text, 4 * tiles, inputs))
            rows.append(numpy.array(decoded, dtype=numpy.uint32).T.copy().view(numpy.float16))
    return torch.from_numpy(numpy.concatenate(rows))


@pytest.mark.parametrize("name", PLANS)
def test_assembler_turns_codes_into_levels(make_packed, name):
    layout, columns = PLANS[name], 512
    form = triton_layout(layout)
    packed = make_packed(layout, 1, columns)
    tensors = dict(packed.tensors)
    if layout.column_scale:
        tensors["column_scale"] = torch.ones(1, columns).half()
    arrays = repack(tensors, layout, columns, [1])
    found = decoded(arrays, form, columns // form.step)
    index = codebook_index(packed.codes, layout).int()
    expected = torch.tensor(layout.codebook_values)[index][0] / form.entries_per_unit + form.offset
    expected = expected.double()
    if form.inline_salient:
        lines = arrays["salient_affine"][:, 0].double()
        slope, offset = (expand_groups(line[None], layout, columns)[0] for line in lines.T)
        column, _ = salient_codes(tensors, layout, columns, name)
        column = column[column < columns]
        assert len(column) > columns // 16
        code = packed.codes[0] * SUBNORMAL * (4 if form.mode == "uniform" else 1)
        salient = code * slope + offset
    for k in range(columns):
        dot, r = dot_position.fn(k, form.group, form.mode, form.chain_tiles)
        sixteenfold = form.mode == "uniform" and dot % 2 == 1
        wanted = expected[k]
        if form.inline_salient and k in column:
            wanted = (salient[k] * (16 if sixteenfold else 1)).half()
        elif sixteenfold:
            wanted = (expected[k] - form.offset) * 16 + form.offset
        assert found[dot, r] == wanted
