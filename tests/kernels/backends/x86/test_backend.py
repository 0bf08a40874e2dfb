"""When backend `x86` is taken, and that a layer of it computes; kernels: `test_op.py`."""

import dataclasses

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.backend import X86Backend
from precalib_kernels.format import reference
from precalib_kernels.toolchain.compile import BuildError

LAYOUT = RECIPE_LAYOUTS["balanced-4"]
SPEC = LinearSpec(LAYOUT, 160, (32, 16), torch.float32, "cpu")


@pytest.fixture
def machine(monkeypatch):
    """The kernels can be built, and the processor has these instructions."""
    return lambda *isas: monkeypatch.setattr(library, "supported_isas", lambda: isas)


def test_it_takes_any_layout_and_type(machine):
    machine("avx2")
    for layout in RECIPE_LAYOUTS.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            spec = dataclasses.replace(SPEC, layout=layout, dtype=dtype)
            assert X86Backend.can_run(spec) is None


def test_it_says_why_not(machine, monkeypatch):
    machine("avx2", "avx512")
    on_gpu = dataclasses.replace(SPEC, device="cuda")
    assert X86Backend.can_run(on_gpu) == "computes on CPUs, not on cuda"
    assert X86Backend.can_run(dataclasses.replace(SPEC, int8_activations=True)) is None
    machine()
    assert X86Backend.can_run(SPEC) == "needs AVX2, FMA and F16C"

    def broken():
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(library, "supported_isas", broken)
    assert X86Backend.can_run(SPEC) == "no C++ compiler"


def test_activations_of_8_bits_are_told_to_the_kernels():
    assert not X86Backend(SPEC).layout.int8_inputs
    assert X86Backend(dataclasses.replace(SPEC, int8_activations=True)).layout.int8_inputs


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes(make_packed, as_layer, bias):
    if reason := X86Backend.can_run(SPEC):
        pytest.skip(reason)
    tensors = make_packed(LAYOUT, 48, 160).tensors
    tensors["column_scale"] = torch.cat([tensors["column_scale"], torch.ones(1, 160).half()])
    backend = X86Backend(SPEC)
    layer = as_layer(backend, tensors)
    assert {name for name, _ in layer.named_parameters()} == {"qweight", "x86_layout"}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 160), generator=generator)
    shift = torch.randn(48, generator=generator) if bias else None
    expected = reference.linear(x, tensors, LAYOUT, shift, SPEC.shard_sizes)
    torch.testing.assert_close(backend.apply(layer, x, shift), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", RECIPE_LAYOUTS.values(), ids=RECIPE_LAYOUTS)
def test_the_default_type_does_not_change_the_weight(make_packed, layout):
    """An engine repacks while torch's default is the type of its activations."""
    tensors = make_packed(layout, 32, 256).tensors
    backend = X86Backend(
        dataclasses.replace(SPEC, layout=layout, input_size=256, shard_sizes=(32,))
    )
    expected = backend.repack(tensors, "test")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(backend.repack(tensors, "test"), expected)
    finally:
        torch.set_default_dtype(torch.float32)
