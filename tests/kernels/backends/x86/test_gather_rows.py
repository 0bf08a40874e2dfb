"""Rows of packed weights by number, against the reference."""

import pytest
import torch
from x86_cases import LAYOUTS

from precalib_kernels.backends.x86 import library, op
from precalib_kernels.toolchain.compile import BuildError

try:
    ISAS, REASON = library.supported_isas(), "this processor lacks AVX2"
except BuildError as error:
    ISAS, REASON = (), f"the kernels cannot be built here: {error}"
pytestmark = pytest.mark.skipif(not ISAS, reason=REASON)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather(case, ids, dtype, isa=library.AVX512_VNNI.name):
    layout = op.layout_tensor(case.memory(isa))
    return op.gather_rows(ids, case.packed(isa), layout, sum(case.shards), dtype, case.columns)


@pytest.mark.parametrize("isa", ["avx2", "avx512_vnni"])  # codes in nibbles, and in bit planes
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_the_reference(make_case, name, isa):
    case = make_case(LAYOUTS[name], columns=1056 if name == "far positions" else 416)
    ids = torch.randperm(sum(case.shards), generator=torch.Generator().manual_seed(2))
    expected = (case.base * case.scale)[ids]
    rows = gather(case, ids, torch.float32, isa)
    # A scale, a product and a column scale are rounded once each, here and there; a small salient
    # weight is the difference of two numbers as large as the largest.
    bound = 2.0**-24 * (6 * expected.abs() + 3 * expected.abs().amax(1, keepdim=True))
    assert bool(((rows.double() - expected).abs() <= bound).all())
    for dtype in TYPES[1:]:
        assert torch.equal(gather(case, ids, dtype, isa), rows.to(dtype))


def test_ids_have_any_shape_and_repeat(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    every = gather(case, torch.arange(sum(case.shards)), torch.bfloat16)
    for shape in ((), (1,), (0,), (2, 3), (3, 1, 5)):
        ids = torch.randint(0, sum(case.shards), shape)
        assert torch.equal(gather(case, ids, torch.bfloat16), every[ids])


@pytest.mark.parametrize("number", [-1, 54, 2**40])
def test_an_id_that_is_no_row(make_case, number):
    case = make_case(LAYOUTS["balanced-4"])
    assert sum(case.shards) == 54
    with pytest.raises(RuntimeError, match=rf"id {number} is not one of 54 rows"):
        gather(case, torch.tensor([0, number]), torch.float32)


def test_ids_of_another_type(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    with pytest.raises(RuntimeError, match="ids are not of int64"):
        gather(case, torch.tensor([0], dtype=torch.int32), torch.float32)


def test_the_largest_and_the_smallest_numbers_round_as_torch_rounds(make_case):
    """Infinities of float16, its subnormal numbers and ties."""

    def edit(tensors):
        tensors["row_scale"][0], tensors["row_scale"][1] = 60000, 2.0**-20

    case = make_case(LAYOUTS["balanced-4"], shards=(2,), edit=edit)
    ids = torch.tensor([0, 1])
    rows = gather(case, ids, torch.float32)
    assert bool(rows[1].abs().max() < 2.0**-14)
    for dtype in TYPES[1:]:
        assert torch.equal(gather(case, ids, dtype), rows.to(dtype))
