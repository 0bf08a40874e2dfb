"""Operators: schemas, fakes, compile, and refusals."""

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels import ops
from precalib_kernels.backends import reference as backend
from precalib_kernels.backends.triton import op as triton_op
from precalib_kernels.backends.triton import salient_op
from precalib_kernels.backends.triton.repack import repack
from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout

# Names and order of arguments are what compiled graphs and other backends rely on.
LINEAR = "(Tensor x, Tensor[] packed, Tensor? bias, SymInt[] shard_sizes, str layout) -> Tensor"
DEQUANTIZE = (
    "(Tensor[] packed, SymInt input_size, SymInt[] shard_sizes, str layout, ScalarType dtype)"
    " -> Tensor"
)
SCHEMAS = {
    "linear": LINEAR,
    "dequantize": DEQUANTIZE,
    "cpu_linear": (
        "(Tensor x, Tensor packed, Tensor x86_layout, Tensor? bias, int outputs, int isa) -> Tensor"
    ),
    "gpu_linear": LINEAR,
    "gpu_dequantize": DEQUANTIZE,
    "gpu_grouped_linear": (
        "(Tensor x, Tensor[] packed, Tensor? bias, Tensor routes, Tensor expert_ids, Tensor used,"
        " Tensor? factors, SymInt top_k, int block, bool complete, SymInt[] shard_sizes,"
        " str layout) -> Tensor"
    ),
    "gpu_gather_rows": (
        "(Tensor ids, Tensor[] packed, SymInt input_size, SymInt outputs, str layout,"
        " ScalarType dtype) -> Tensor"
    ),
    "gpu_sparse": (
        "(Tensor y, Tensor x, Tensor positions, Tensor values, Tensor unit, Tensor? bias,"
        " SymInt group_size) -> Tensor"
    ),
}


def test_schemas():
    found = {name: str(getattr(torch.ops.precalib, name).default._schema) for name in SCHEMAS}
    assert found == {name: f"precalib::{name}{text}" for name, text in SCHEMAS.items()}


def tensors_of(packed):
    rows, columns = packed.shape
    return [packed.tensors[name] for name in packed.layout.tensors(rows, columns)]


@pytest.fixture(params=RECIPE_LAYOUTS)
def arguments(request, make_packed):
    packed = make_packed(RECIPE_LAYOUTS[request.param], rows=6, columns=160)
    return packed, tensors_of(packed)


@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_pass_opcheck(arguments, with_bias):
    packed, tensors = arguments
    bias = torch.randn(6) if with_bias else None
    text = packed.layout.to_text()
    torch.library.opcheck(
        torch.ops.precalib.linear.default, (torch.randn(2, 160), tensors, bias, [6], text)
    )
    torch.library.opcheck(
        torch.ops.precalib.dequantize.default, (tensors, 160, [6], text, torch.bfloat16)
    )


def test_linear_is_the_reference_also_when_compiled(arguments):
    packed, tensors = arguments
    x, bias, text = torch.randn(3, 160), torch.randn(6), packed.layout.to_text()
    expected = reference.linear(x, packed.tensors, packed.layout, bias)
    assert torch.equal(backend.linear(x, tensors, bias, [6], text), expected)

    def run(x: torch.Tensor) -> torch.Tensor:
        return backend.linear(x, tensors, bias, [6], text)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_dequantize_gives_the_weight_in_the_wanted_type(arguments):
    packed, tensors = arguments
    weight = backend.dequantize(tensors, 160, [6], packed.layout.to_text(), torch.half)
    assert torch.equal(weight, reference.dequantize(packed.tensors, packed.layout, 160).half())


def both(operator, arguments):
    """Calls of an operator on real tensors and on those of a fake."""
    meta = [
        [t.to("meta") for t in a]
        if isinstance(a, list) and isinstance(a[0], torch.Tensor)
        else a.to("meta")
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    yield lambda: operator(*arguments)
    yield lambda: operator(*meta)


@pytest.mark.parametrize("name", ["linear", "dequantize"])
def test_wrong_tensors_are_refused_and_faked_alike(arguments, name):
    packed, tensors = arguments
    text = packed.layout.to_text()

    def given(tensors=tensors, columns=160, sizes=(6,)):
        if name == "linear":
            return torch.randn(3, columns), tensors, None, list(sizes), text
        return tensors, columns, list(sizes), text, torch.float32

    for wrong, match in (
        (given(sizes=(4,)), "do not add up to 6 output rows"),
        (given(tensors[:-1]), "packed tensors, expected"),
        (given(columns=192), "'qweight' is "),
    ):
        for call in both(getattr(torch.ops.precalib, name), wrong):
            with pytest.raises(FormatError, match=match):
                call()


@pytest.fixture
def arrays(make_packed):
    """Arguments of the operators over arrays in GPU memory: layout, arrays, as text."""
    packed = make_packed(RECIPE_LAYOUTS["balanced-4"], rows=70, columns=160)
    made = repack(packed.tensors, packed.layout, 160, [70])
    return [made[name] for name in ops.array_order(packed.layout)], packed.layout.to_text()


@pytest.mark.parametrize("with_bias", [False, True])
def test_gpu_linear_passes_opcheck_without_rows(arrays, with_bias):
    """Which is all of it that runs without a GPU; `interpreted_suite.py` has the rest."""
    packed, text = arrays
    bias = torch.randn(70).half() if with_bias else None
    x = torch.randn(0, 160).half()
    assert triton_op.gpu_linear(x, packed, bias, [70], text).shape == (0, 70)
    torch.library.opcheck(torch.ops.precalib.gpu_linear.default, (x, packed, bias, [70], text))


def test_gpu_fakes_have_the_shapes_of_results(arrays):
    packed, text = arrays
    packed = [array.to("meta") for array in packed]
    x = torch.empty(2, 3, 160, dtype=torch.bfloat16, device="meta")
    y = triton_op.gpu_linear(x, packed, None, [70], text)
    assert (y.shape, y.dtype) == ((2, 3, 70), torch.bfloat16)
    weight = triton_op.gpu_dequantize(packed, 160, [70], text, torch.half)
    assert (weight.shape, weight.dtype) == ((70, 160), torch.half)


@pytest.mark.parametrize("name", ["gpu_linear", "gpu_dequantize"])
def test_wrong_arrays_are_refused_and_faked_alike(arrays, name):
    packed, text = arrays

    def given(packed=packed, columns=160, sizes=(70,)):
        if name == "gpu_linear":
            return torch.randn(3, columns).half(), packed, None, list(sizes), text
        return packed, columns, list(sizes), text, torch.half

    for wrong, match in (
        (given(packed[:-1]), "arrays of the in-memory form, expected"),
        (given(columns=320), r"'qweight' is \[.*\] torch.int16, expected"),
        (given([packed[0].int(), *packed[1:]]), r"'qweight' is .* torch.int32, expected"),
        (given(sizes=(70, 1)), r"'qweight' is "),
    ):
        for call in both(getattr(torch.ops.precalib, name), wrong):
            with pytest.raises(FormatError, match=match):
                call()


def test_wrong_arguments_of_grouped_products_are_refused(arrays):
    packed, text = arrays
    stacked = [torch.stack([array, array]).to("meta") for array in packed]

    def given(tokens=3, top_k=2, bias=(2, 70), factors=6, dtype=torch.int32, packed=stacked):
        empty = {"device": "meta"}
        return (
            torch.empty(tokens, 160, dtype=torch.half, **empty),
            packed,
            torch.empty(bias, dtype=torch.half, **empty),
            *(torch.empty(size, dtype=dtype, **empty) for size in (16, 2, 1)),
            torch.empty(factors, **empty),
            *(top_k, 8, True, [70], text),
        )

    run = torch.ops.precalib.gpu_grouped_linear
    y = run(*given())
    assert (y.shape, y.dtype) == ((6, 70), torch.half)
    single = [array.to("meta") for array in packed]
    for wrong, match in (
        (given(packed=single), r"'qweight' is "),
        (given(bias=(70,)), r"bias has shape \[70\], expected \[2, 70\]"),
        (given(factors=3), r"'factors' is \[3\] torch.float32, expected \[6\]"),
        (given(dtype=torch.int64), r"'routes' is \[16\] torch.int64, expected"),
        (given(2**24, factors=2**25), "33554432 routes are too many at a time for 70 outputs"),
    ):
        with pytest.raises(FormatError, match=match):
            run(*wrong)


def test_ids_of_another_type_are_refused(arrays):
    packed, text = arrays
    meta = [array.to("meta") for array in packed]
    given = meta, 160, 70, text, torch.half
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    assert torch.ops.precalib.gpu_gather_rows(ids, *given).shape == (2, 3, 160)
    with pytest.raises(FormatError, match=r"ids are torch\.int32"):
        torch.ops.precalib.gpu_gather_rows(ids.int(), *given)


def test_the_fake_of_cpu_linear_checks_what_it_can():
    def given(x=(2, 160), dtype=torch.float32, packed=torch.uint8, size=2000, bias=None):
        empty = {"device": "meta"}
        return (
            torch.empty(x, dtype=dtype, **empty),
            torch.empty(640, dtype=packed, **empty),
            torch.empty(size, dtype=torch.uint8, **empty),
            None if bias is None else torch.empty(bias[0], dtype=bias[1], **empty),
            48,
            -1,
        )

    run = torch.ops.precalib.cpu_linear
    y = run(*given((2, 3, 160), torch.bfloat16, bias=(48, torch.bfloat16)))
    assert (y.shape, y.dtype) == ((2, 3, 48), torch.bfloat16)
    for wrong, match in (
        (given(()), r"x is \[\] torch.float32, expected \[..., K\] bfloat16, float16 or float32"),
        (given(dtype=torch.float64), "x is .* torch.float64, expected"),
        (given(packed=torch.int8), r"'packed' is \[640\] torch.int8, expected \[640\] torch.uint8"),
        (given(size=8), "'x86_layout' has 8 bytes, expected more than"),
        (given(bias=(47, torch.float32)), r"bias has shape \[47\], expected \[48\]"),
        (given(bias=(48, torch.half)), "bias is torch.float16, expected torch.float32"),
    ):
        with pytest.raises(FormatError, match=match):
            run(*wrong)


def test_gpu_sparse_passes_opcheck_without_rows(make_packed):
    layout = Layout(4, 64, salient_count=2)
    tensors = make_packed(layout, 5, 160).tensors
    made = salient_op.salient_arrays(tensors, tensors["scales"] / 15, layout, 160)
    given = (torch.zeros(0, 5), torch.zeros(0, 160), *made.values(), torch.zeros(5), 64)
    torch.library.opcheck(torch.ops.precalib.gpu_sparse.default, given)
