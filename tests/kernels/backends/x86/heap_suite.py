"""Memory that a product takes besides its operands, held to the bound in docs/cpu-kernels.md.

Run by test_memory.py with counted_heap.cpp preloaded, which has to be there before Python is.
"""

import ctypes
import dataclasses
import itertools

import pytest
import torch
from x86_cases import LAYOUTS

from precalib_kernels.backends.x86 import library

COUNTED = ctypes.CDLL(None).counted_bytes
COUNTED.restype = ctypes.c_longlong
SHUFFLING = ("avx2", "avx_vnni", "avx512")
BATCH_SIZES = (1, 4, 6, 12, 20, 70, 600)
DTYPES = (torch.float32, torch.bfloat16)
COLUMNS, SHARDS = 2176, (520, 40)
CONSTANT, PER_THREAD = 4 << 10, 1 << 20


def rows_at_once(kernel: str, isa: str, m: int) -> int:
    """Rows of x that a kernel prepares at a time."""
    if kernel.startswith("gemv"):
        return m
    if kernel == "gemm_bf16_register":
        return 16
    if isa in SHUFFLING:
        return min(m, 96)
    most = 512 if kernel.startswith("gemm_bf16") else 64
    return min(-(-m // 16) * 16, most)


def bytes_per_activation(kernel: str) -> int:
    """Of a row that is prepared."""
    if kernel == "gemm_fp32":
        return 4
    if kernel == "gemm_bf16_register":
        return 6
    return 2 if kernel.startswith("gemm_bf16") else 8


def bound(case, kernel: str, isa: str, m: int, threads: int) -> int:
    """The formula of the documentation."""
    variants = len(case.shards) if case.layout.column_scale else 1
    group, groups = case.layout.group_size, case.memory(isa).groups
    row = bytes_per_activation(kernel) * group * groups + 20 * groups
    shared = variants * (rows_at_once(kernel, isa, m) * row + 4 * case.columns) + CONSTANT
    return shared + threads * (PER_THREAD + 4 * case.columns + 512 * group)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["balanced-4", "signs"])
def test_memory_of_a_call_is_bounded(make_case, threads, name):
    exact = make_case(LAYOUTS[name], columns=COLUMNS, shards=SHARDS)
    torch.set_num_threads(threads)
    shares = []
    for case in (exact, dataclasses.replace(exact, int8_inputs=True)):
        for isa, m, dtype in itertools.product(library.supported_isas(), BATCH_SIZES, DTYPES):
            x = torch.zeros(m, COLUMNS, dtype=dtype)
            case.packed(isa)
            COUNTED()
            case.linear(x, isa)
            taken = COUNTED()
            kernel = case.kernel(isa, dtype, m)
            most = bound(case, kernel, isa, m, threads)
            assert 0 < taken <= most, (isa, kernel, m, taken, most)
            shares.append(taken / most)
    assert max(shares) > 0.25  # or the bound would say little


def test_memory_does_not_grow_with_the_batch(make_case):
    """What is counted is not what is held: some KB are taken and returned for each slab of x."""
    case = make_case(LAYOUTS["balanced-4"], columns=COLUMNS, shards=SHARDS)
    torch.set_num_threads(1)
    for isa in library.supported_isas():
        taken = []
        for m in (600, 2400):
            COUNTED()
            case.linear(torch.zeros(m, COLUMNS, dtype=torch.bfloat16), isa)
            taken.append(COUNTED())
        assert taken[0] <= taken[1] < 1.05 * taken[0], isa
