"""The Arm kernels in an emulator, against the reference, within an error bound that is derived."""

import math

import pytest
import torch
from arm_cases import LAYOUTS
from arm_emulator import ISAS, TYPES

pytestmark = pytest.mark.slow
SPLITS = {torch.float32: "x3", torch.bfloat16: "x2", torch.float16: "x2"}
BATCH_SIZES = (*range(1, 10), 15, 16, 33, 64)


def assert_right(run, case, problems, bound_rows=None):
    """Every result is within the bound of the kernel that the library reports for it."""
    whole = bound_rows or {}
    for problem, (y, kernel) in zip(problems, run(problems), strict=True):
        x = problem.x
        key = x.dtype, kernel[-2:]
        if key in whole:
            expected, bound = (part[: len(x)] for part in whole[key])
        else:
            expected = case.expected(x, problem.bias)
            bound = case.bound(x, expected, kernel)
        error = (y.double() - expected).abs()
        where = f"{problem.isa} {kernel} {x.dtype} M = {len(x)}"
        assert bool((error <= bound).all()), f"{where}: {float((error / bound).max())} bounds off"


def with_rows(case, batch_sizes, types=TYPES):
    """Problems of both ISAs, all types and batch sizes, and what bounds their results."""
    problems, whole = [], {}
    for dtype in types:
        x = torch.randn(max(batch_sizes), case.columns).to(dtype)
        splits = "x1" if case.memory.int8_inputs else SPLITS[dtype]
        expected = case.expected(x)
        whole[dtype, splits] = expected, case.bound(x, expected, splits)
        problems += [case.problem(x[:m], isa) for isa in ISAS for m in batch_sizes]
    return problems, whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_type_and_isa(run, make_case, name):
    case = make_case(LAYOUTS[name])
    assert_right(run, case, *with_rows(case, BATCH_SIZES))


@pytest.mark.parametrize("name", ["balanced-4", "signs"])
def test_every_batch_size(run, make_case, name):
    case = make_case(LAYOUTS[name], columns=160, shards=(17, 4))
    assert_right(run, case, *with_rows(case, range(1, 65), (torch.bfloat16,)))


@pytest.mark.parametrize("name", ["balanced-4", "paper-3", "16 entries", "two bits, trellis"])
def test_activations_of_8_bits(run, make_case, name):
    case = make_case(LAYOUTS[name], int8_inputs=True)
    assert_right(run, case, *with_rows(case, (1, 2, 3, 4, 5, 12, 33)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_one_group_of_any_size(run, make_packed, make_case, bits):
    for columns in (32, 64, 96, 128, 224):
        layout = LAYOUTS[f"balanced-{bits}"]
        for size in (32, columns, 1024):
            sized = type(layout)(**{**vars(layout), "group_size": size})
            case = make_case(sized, columns=columns, shards=(3,))
            assert_right(run, case, *with_rows(case, (1, 3, 6), (torch.float32,)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_by_number(run, make_case, name):
    """As `tests/kernels/backends/x86/test_gather_rows.py` has it."""
    case = make_case(LAYOUTS[name])
    ids = torch.randperm(54)
    results = [y for y, _ in run([case.rows(ids, dtype) for dtype in TYPES])]
    expected = case.weight[ids]
    bound = 2.0**-24 * (6 * expected.abs() + 3 * expected.abs().amax(1, keepdim=True))
    assert bool(((results[0].double() - expected).abs() <= bound).all())
    for dtype, rows in zip(TYPES[1:], results[1:], strict=True):
        assert torch.equal(rows, results[0].to(dtype))


def test_a_bias_is_added(run, make_case):
    case = make_case(LAYOUTS["balanced-3"])
    for dtype in TYPES:
        bias = torch.randn(54).to(dtype)
        x = torch.randn(7, case.columns).to(dtype)
        assert_right(run, case, [case.problem(x[:m], isa, bias) for isa in ISAS for m in (1, 7)])


def test_more_rows_than_are_prepared_at_a_time(run, make_case):
    case = make_case(LAYOUTS["balanced-4"], columns=160)
    x = torch.randn(259, 160).to(torch.bfloat16)
    assert_right(run, case, [case.problem(x, isa) for isa in ISAS])


def test_large_inputs_do_not_drown_the_others(run, make_case):
    case = make_case(LAYOUTS["balanced-4"])
    for dtype in TYPES:
        x = torch.randn(7, case.columns)
        x[:, 5], x[:, 200] = 1000, -3000
        x = x.to(dtype)
        assert_right(run, case, [case.problem(x[:m], isa) for isa in ISAS for m in (1, 7)])


@pytest.mark.parametrize("name", ["balanced-3", "paper-4"])
def test_scales_of_zero(run, make_case, name):
    def edit(tensors):
        tensors["scales"][:, ::2] = 255 if tensors["scales"].dtype == torch.uint8 else 0
        if "row_scale" in tensors:
            tensors["row_scale"][-1] = 0

    case = make_case(LAYOUTS[name], edit=edit)
    x = torch.randn(9, case.columns)
    assert_right(run, case, [case.problem(x[:m], isa) for isa in ISAS for m in (1, 9)])


def test_what_is_not_finite_stays_so(run, make_case):
    case = make_case(LAYOUTS["balanced-4"])
    problems = []
    for bad in (math.nan, math.inf):
        x = torch.randn(6, case.columns, dtype=torch.bfloat16)
        x[0, 77] = bad
        problems += [case.problem(x[:m], isa) for isa in ISAS for m in (1, 4, 6)]
    for y, _ in run(problems):
        assert not bool(y[0].isfinite().any())
        assert bool(y[1:].isfinite().all())


def test_inputs_of_nothing_and_of_next_to_nothing(run, make_case):
    case = make_case(LAYOUTS["balanced-4"])
    zero = torch.zeros(6, case.columns, dtype=torch.bfloat16)
    tiny = torch.full((6, case.columns), 1e-38)
    for x, m in ((zero, 0), (zero, 1), (zero, 6), (tiny, 1), (tiny, 6)):
        for y, _ in run([case.problem(x[:m], isa) for isa in ISAS]):
            assert y.shape == (m, 54)
            assert bool(y.isfinite().all())
            assert x is tiny or not bool(y.any())


def test_one_thread_and_two_agree(run, make_case):
    case = make_case(LAYOUTS["balanced-3"], columns=1024, shards=(520, 40))
    x = torch.randn(9, 1024, dtype=torch.bfloat16)
    problems = [case.problem(x[:m], isa) for isa in ISAS for m in (1, 4, 9)]
    for (one, _), (two, _) in zip(run(problems), run(problems, threads=2), strict=True):
        assert torch.equal(one, two)


def test_kernels_by_batch_size(run, make_case):
    case, rounded = (make_case(LAYOUTS["balanced-4"], int8_inputs=flag) for flag in (False, True))
    x = torch.randn(5, case.columns)
    found = [
        kernel
        for y, kernel in run(
            [
                of.problem(x[:m].to(t), "dotprod")
                for of in (case, rounded)
                for t in TYPES
                for m in (4, 5)
            ]
        )
    ]
    exact = [f"{kind}_int8{SPLITS[t]}" for t in TYPES for kind in ("gemv", "gemm")]
    assert found == exact + ["gemv_int8x1", "gemm_int8x1"] * 3
