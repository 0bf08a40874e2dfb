"""The choice of a backend, its reasons, and the record of it."""

import dataclasses
import json
import pickle

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.reference import ReferenceBackend
from precalib_kernels.backends.registry import (
    FORMER_NAMES,
    BackendRegistry,
    default_registry,
)
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.errors import ServingError

SPEC = LinearSpec(RECIPE_LAYOUTS["balanced-4"], 160, (48,), torch.float32, "cpu")


class Fussy(ReferenceBackend):
    """Runs on nothing that exists."""

    name = "fussy"

    @classmethod
    def can_run(cls, spec):
        return super().can_run(spec) or f"needs a quantum computer, not a {spec.device}"


class Rounding(ReferenceBackend):
    """Can round activations."""

    name = "rounding"
    int8_activations = True


@pytest.fixture
def registry():
    return BackendRegistry((Fussy, Rounding, ReferenceBackend))


def test_the_first_that_can_run_is_taken(registry):
    choice = registry.choose(SPEC)
    assert choice.backend is Rounding
    assert isinstance(choice.make(), Rounding)
    assert choice.make().spec is SPEC
    assert choice.reasons == {
        "fussy": "needs a quantum computer, not a cpu",
        "reference": "lower priority",
    }
    assert choice.reason == "first that can run; fussy: needs a quantum computer, not a cpu"


def test_what_to_expect_is_part_of_the_reason(registry):
    class Slow(Rounding):
        name = "slow"

        @classmethod
        def expectation(cls, spec):
            return f"slow for {spec.dtype}"

    registry.register(Slow, before="rounding")
    assert registry.choose(SPEC).reason.endswith(f"not a cpu; slow for {SPEC.dtype}")
    assert registry.choose(SPEC, "slow").reason == f"asked for; slow for {SPEC.dtype}"


def test_one_that_is_asked_for_is_taken(registry):
    choice = registry.choose(SPEC, "reference")
    assert choice.backend is ReferenceBackend
    assert choice.reasons == dict.fromkeys(("fussy", "rounding"), "reference was asked for")
    assert choice.reason == "asked for"


def test_one_that_cannot_run_is_not_forced(registry):
    with pytest.raises(
        ServingError,
        match=r"^no backend can run this layer \(fussy: needs a quantum computer, not a cpu\)$",
    ):
        registry.choose(SPEC, "fussy")


def test_where_none_can_run_all_say_why():
    registry = BackendRegistry((Fussy, TritonBackend))
    spec = dataclasses.replace(SPEC, experts=2)
    why = r"fussy: needs a quantum computer, .*; triton: computes on GPUs, not on cpu"
    with pytest.raises(ServingError, match=rf"\({why}\)$"):
        registry.choose(spec)


def test_an_unknown_one_is_refused_with_the_known_ones(registry):
    known = "fussy, rounding, reference"
    with pytest.raises(ServingError, match=rf"^there is no such backend; choose one of {known}$"):
        registry.choose(SPEC, "turbo")


def test_activations_in_8_bits_are_for_who_can_round_them(registry):
    rounded = dataclasses.replace(SPEC, int8_activations=True)
    choice = registry.choose(rounded)
    assert choice.backend is Rounding
    assert choice.reason == (
        "first that can run; fussy: has no 8-bit activations; activations in 8 bits, as asked for"
    )
    with pytest.raises(ServingError, match=r"\(reference: has no 8-bit activations\)$"):
        registry.choose(rounded, "reference")


def test_reasons_name_every_backend(registry):
    assert registry.reasons(SPEC) == {
        "fussy": "needs a quantum computer, not a cpu",
        "rounding": None,
        "reference": None,
    }


def test_an_ordinary_layer_is_described():
    reasons = default_registry().describe("cpu")
    assert list(reasons) == ["x86", "arm", "triton", "reference"]
    assert reasons["triton"] == "computes on GPUs, not on cpu"
    assert default_registry().describe("cuda")["x86"] == "computes on CPUs, not on cuda"


def test_a_choice_is_a_record(registry):
    choice = registry.choose(SPEC)
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.asked_for = True
    assert json.loads(json.dumps(choice.to_dict())) == {
        "spec": SPEC.to_dict(),
        "backend": "rounding",
        "reasons": dict(choice.reasons),
        "asked_for": False,
    }
    choice = default_registry().choose(SPEC, "reference")
    assert pickle.loads(pickle.dumps(choice)) == choice


def test_backends_are_tried_in_the_order_they_were_put_in(registry):
    class Other(Rounding):
        name = "other"

    registry.register(Other, before="rounding")
    assert registry.names == ("fussy", "other", "rounding", "reference")
    assert registry.choose(SPEC).backend is Other
    with pytest.raises(ValueError, match="there is a backend 'other' already"):
        registry.register(Other)


def test_a_registry_is_nobody_elses():
    default_registry().register(Fussy)
    assert default_registry().names == ("x86", "arm", "triton", "reference")


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_former_names_are_understood(former, name):
    class Renamed(ReferenceBackend):
        pass

    Renamed.name = name
    registry = BackendRegistry((ReferenceBackend, Renamed))
    assert registry.resolve(former) == registry.resolve(name) == name
    assert registry.choose(SPEC, former).backend is Renamed


def test_a_backend_of_its_own_is_one_class(make_packed, as_layer):
    """Other tensors under other names, and its own product."""

    class Doubled(Backend):
        name = "doubled"

        def prepare(self, tensors, where):  # noqa: ARG002
            weight = torch.ops.precalib.dequantize(
                list(tensors.values()), 160, [48], self.spec.layout.to_text(), self.spec.dtype
            )
            return {"weight": 2 * weight}

        def apply(self, layer, x, bias):
            return torch.nn.functional.linear(x, layer.weight / 2, bias)

    packed = make_packed(SPEC.layout, 48, 160)
    backend = BackendRegistry((Doubled,)).choose(SPEC).make()
    layer = as_layer(backend, packed.tensors)
    weight = ReferenceBackend(SPEC)
    x = torch.eye(160)
    expected = weight.apply(as_layer(weight, packed.tensors), x, None)
    torch.testing.assert_close(backend.apply(layer, x, None), expected)
