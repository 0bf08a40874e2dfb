"""Rows of packed embeddings, run by `test_numerics.py` as `interpreted_suite.py` is."""

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS
from torch import Tensor
from triton_cases import DEVICE, Case, inline_slack, layout, make_case, sizes

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.backends.triton.gather_op import gpu_gather_rows
from precalib_kernels.backends.triton.memory_layout import triton_layout


def gather(case: Case, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    text = case.layout.to_text()
    rows = sum(case.parts)
    return gpu_gather_rows(ids.to(DEVICE), case.packed, case.columns, rows, text, dtype).cpu()


FORMS = [
    pytest.param(layout(2, "table", 32, 1), 64, id="2-table"),
    pytest.param(layout(3, "trellis", 128, 2), 288, id="3-trellis"),
    pytest.param(layout(4, "uniform", 64, 2), 160, id="4-uniform"),
    pytest.param(RECIPE_LAYOUTS["balanced-4"], 160, id="balanced-4"),
    pytest.param(RECIPE_LAYOUTS["balanced-5"], 96, id="balanced-5"),
    pytest.param(RECIPE_LAYOUTS["paper-4"], 288, id="in-place"),
]


@pytest.mark.parametrize(("chosen", "columns"), FORMS)
def test_rows_are_those_of_the_reference(chosen, columns):
    """More than a tile of rows, of which the last is begun; more ids than a program takes."""
    case = make_case(chosen, [70], columns)
    ids = torch.tensor([69, 0, 64, 63, 1, 64, 30, 5, 68, 2])
    rows, expected = gather(case, ids), case.weight()[ids]
    if triton_layout(chosen).inline_salient:
        allowed = inline_slack(case)[0][ids]
    else:
        base, added = (size[ids] for size in sizes(case))
        allowed = 2**-20 * base + 2**-11 * added + 1e-9
    assert ((rows.double() - expected).abs() <= allowed).all()
    half = gather(case, ids, torch.float16)
    assert torch.equal(half, rows.half())


def test_ids_have_any_shape_and_repeat():
    case = make_case(layout(4, "uniform", 32, 0), [5], 32)
    every = gather(case, torch.arange(5))
    for shape in ((), (0,), (2, 3), (3, 1, 4)):
        ids = torch.randint(0, 5, shape)
        assert torch.equal(gather(case, ids), every[ids])


@pytest.mark.parametrize("number", [-1, 5, 2**33])
@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU, of no use after an assertion")
def test_an_id_that_is_no_row(number):
    case = make_case(layout(4, "uniform", 32, 0), [5], 32)
    with pytest.raises(IndexError, match=f"{number}.* for rows 0 to 4"):
        gather(case, torch.tensor([0, number]))


def test_the_operator_is_one_for_torch():
    case = make_case(layout(4, "uniform", 32, 0), [5], 32)
    text = case.layout.to_text()
    arguments = torch.tensor([[1, 4]], device=DEVICE), case.packed, 32, 5, text, torch.float32
    torch.library.opcheck(torch.ops.precalib.gpu_gather_rows.default, arguments)


def test_the_backend_looks_up_what_it_multiplies_with(as_layer):
    """As a tied head and embedding share it."""
    case = make_case(layout(4, "trellis", 64, 2), [20], 96)
    spec = LinearSpec(case.layout, 96, (20,), torch.float16, "cuda", embedding=True)
    backend = TritonBackend(spec)
    layer = as_layer(backend, {name: tensor.to(DEVICE) for name, tensor in case.tensors.items()})
    rows = backend.embedding(layer, torch.arange(20, device=DEVICE))
    assert rows.dtype == torch.float16
    x = torch.randn(2, 96, device=DEVICE).half()
    y = backend.apply(layer, x, None)
    torch.testing.assert_close(y.float(), x.float() @ rows.float().T, rtol=0.01, atol=0.05)
