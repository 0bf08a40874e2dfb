"""When backend `arm` is taken, and what it hands to the operator; kernels: `test_products.py`."""

import dataclasses
import platform
import types

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.arm import library
from precalib_kernels.backends.arm.backend import ArmBackend
from precalib_kernels.backends.arm.memory_layout import ArmLayout, repack
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.x86 import op
from precalib_kernels.format import reference
from precalib_kernels.toolchain.compile import BuildError

LAYOUT = RECIPE_LAYOUTS["balanced-4"]
SPEC = LinearSpec(LAYOUT, 160, (32, 16), torch.float32, "cpu")


@pytest.fixture
def machine(monkeypatch):
    """The kernels can be built, and the processor has these instructions."""
    return lambda *isas: monkeypatch.setattr(library, "supported_isas", lambda: isas)


def test_it_takes_any_layout_and_type(machine):
    machine("dotprod")
    for layout in RECIPE_LAYOUTS.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rounded in (False, True):
                spec = dataclasses.replace(
                    SPEC, layout=layout, dtype=dtype, int8_activations=rounded
                )
                assert ArmBackend.can_run(spec) is None


def test_it_says_why_not(machine, monkeypatch):
    machine("dotprod", "i8mm")
    on_gpu = dataclasses.replace(SPEC, device="cuda")
    assert ArmBackend.can_run(on_gpu) == "computes on CPUs, not on cuda"
    experts = dataclasses.replace(SPEC, experts=4)
    assert ArmBackend.can_run(experts) == "computes one matrix per layer, not 4 experts"
    machine()
    assert ArmBackend.can_run(SPEC) == "needs the dot product instructions of Armv8.2 (asimddp)"
    monkeypatch.undo()
    library.supported_isas.cache_clear()
    library.load.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert ArmBackend.can_run(SPEC) == "the kernels are for aarch64, this is riscv64"

    def broken():
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(library, "supported_isas", broken)
    assert ArmBackend.can_run(SPEC) == "no C++ compiler"


def test_a_layer_calls_the_operator(make_packed, as_layer, monkeypatch):
    """The operator is the shared one: here it is replaced by the reference."""
    tensors = make_packed(LAYOUT, 48, 160).tensors
    tensors["column_scale"] = torch.cat([tensors["column_scale"], torch.ones(1, 160).half()])
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = ArmLayout(LAYOUT, 160, (32, 16))
    monkeypatch.setattr(library, "load", types.SimpleNamespace)

    def linear(x, packed, layout, bias, outputs, isa):
        assert torch.equal(packed, repack(kept, memory, "here"))
        assert bytes(layout.numpy()) == memory.to_bytes()
        assert (outputs, isa) == (48, -1)
        return reference.linear(x, kept, LAYOUT, bias, SPEC.shard_sizes)

    monkeypatch.setattr(op, "linear", linear)
    backend = ArmBackend(SPEC)
    layer = as_layer(backend, tensors)
    assert {name for name, _ in layer.named_parameters()} == {"qweight", "arm_layout"}
    x, bias = torch.randn(3, 160), torch.randn(48)
    assert torch.equal(
        backend.apply(layer, x, bias), reference.linear(x, kept, LAYOUT, bias, SPEC.shard_sizes)
    )


def test_activations_of_8_bits_are_told_to_the_kernels():
    assert not ArmBackend(SPEC).layout.int8_inputs
    assert ArmBackend(dataclasses.replace(SPEC, int8_activations=True)).layout.int8_inputs
