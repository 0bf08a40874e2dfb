"""The operator on an Arm processor: torch, the binding and the kernels together.

Elsewhere these tests skip; `test_products.py` has the kernels without torch.
"""

import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from arm_cases import LAYOUTS
from arm_emulator import TYPES

from precalib_kernels.backends.arm import library
from precalib_kernels.backends.arm.backend import ArmBackend
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.x86 import op
from precalib_kernels.format import reference
from precalib_kernels.toolchain.compile import BuildError

if platform.machine() != "aarch64":
    pytest.skip("this processor lacks Arm's instructions", allow_module_level=True)
try:
    ISAS = library.supported_isas()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def product(make_case):
    """Makes a weight, and a function that multiplies with it."""

    def make(name, **options):
        case = make_case(LAYOUTS[name], **options)
        layout = op.layout_tensor(case.memory, library.load)

        def multiply(x, isa=-1, bias=None):
            return op.linear(x, case.packed, layout, bias, sum(case.memory.shard_sizes), isa)

        return case, multiply

    return make


@pytest.mark.parametrize("isa", range(len(ISAS)))
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_type(product, name, isa):
    case, multiply = product(name)
    for dtype, splits in zip(TYPES, ("x3", "x2", "x2"), strict=True):
        bias = torch.randn(54).to(dtype)
        for m in (1, 4, 7):
            x = torch.randn(m, case.columns).to(dtype)
            expected = case.expected(x, bias)
            y = multiply(x, isa, bias)
            assert y.dtype == dtype
            assert bool(((y.double() - expected).abs() <= case.bound(x, expected, splits)).all())


def test_any_shape_and_stride_of_inputs(product):
    case, multiply = product("balanced-4")
    x = torch.randn(3, case.columns, 2, dtype=torch.bfloat16).transpose(1, 2)
    assert multiply(x).shape == (3, 2, 54)
    assert torch.equal(multiply(x).flatten(0, 1), multiply(x.reshape(6, -1)))


def test_sizes_that_do_not_belong_together_are_refused(product):
    case, multiply = product("balanced-4")
    for x, text in (
        (torch.randn(2, 415), "columns of x are 415, expected 416"),
        (torch.randn(2, 416).double(), "x is not of float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match="precalib::cpu_linear: " + text):
            multiply(x)
    with pytest.raises(RuntimeError, match="this machine has no such ISA"):
        multiply(torch.randn(2, case.columns), isa=len(ISAS))


def test_calls_of_several_threads_do_not_disturb_each_other(product):
    case, multiply = product("balanced-4", columns=1024, shards=(520, 40))
    inputs = [torch.randn(m, case.columns).to(dtype) for m in (1, 4, 6) for dtype in TYPES]
    alone = list(map(multiply, inputs))
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(multiply, inputs), alone))


def test_a_layer_computes(make_packed, as_layer):
    layout = LAYOUTS["balanced-4"]
    tensors = make_packed(layout, 48, 160).tensors
    tensors["column_scale"] = torch.cat([tensors["column_scale"], torch.ones(1, 160).half()])
    spec = LinearSpec(layout, 160, (32, 16), torch.float32, "cpu")
    assert ArmBackend.can_run(spec) is None
    backend = ArmBackend(spec)
    x = torch.randn(2, 3, 160)
    expected = reference.linear(x, tensors, layout, None, spec.shard_sizes)
    result = backend.apply(as_layer(backend, tensors), x, None)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
