"""The choice of a backend, and that each means what the reference means."""

import dataclasses
import re

import pytest
import torch
from vllm.model_executor.layers.linear import ReplicatedLinear

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.backend import X86Backend
from precalib_kernels.errors import ServingError
from precalib_kernels.format.reference import dequantize
from vllm_precalib import backends
from vllm_precalib.backends import (
    FORMER_NAMES,
    Backend,
    DenseBackend,
    ReferenceBackend,
    choose,
    describe,
    unpacked_rows,
)
from vllm_precalib.config import PrecalibConfig


class Fussy(ReferenceBackend):
    """Runs on nothing that exists."""

    name = "fussy"

    @staticmethod
    def can_run(spec):
        return f"needs a quantum computer, not a {spec.device}"


@pytest.fixture
def spec(tiny):
    return LinearSpec(tiny.ROW, 160, (48,), torch.float32, "cpu")


def test_the_default_is_native_or_else_dense(spec, monkeypatch):
    assert isinstance(choose(spec, None, "fc", "row"), X86Backend)
    monkeypatch.setattr(X86Backend, "can_run", lambda _: "no compiler")
    assert isinstance(choose(spec, None, "fc", "row"), DenseBackend)
    assert isinstance(choose(spec, "reference", "fc", "row"), ReferenceBackend)


def test_the_first_that_can_run_is_taken(spec):
    table = (Fussy, ReferenceBackend, DenseBackend)
    assert type(choose(spec, None, "fc", "row", table)) is ReferenceBackend


def test_a_backend_that_cannot_run_is_not_forced(spec):
    with pytest.raises(
        ServingError,
        match=r"^a\.fc: no backend can run this layer \(fussy: needs a quantum computer, not a cpu",
    ):
        choose(spec, "fussy", "a.fc", "row", (Fussy, DenseBackend))


def test_describe_names_every_backend():
    assert dict(describe()) == {
        "x86": None,
        "triton": "computes on GPUs, not on cpu",
        "vllm_mixed_precision": "computes on GPUs, not on cpu",
        "dense": None,
        "reference": None,
    }


def test_an_unknown_backend_is_refused_with_the_known_ones(spec):
    known = "x86, triton, vllm_mixed_precision, dense, reference"
    with pytest.raises(ServingError, match=rf"no such backend; choose one of {known}$"):
        choose(spec, "turbo", "a.fc", "row")


@pytest.fixture
def rounded(spec):
    rounded = dataclasses.replace(spec, int8_activations=True)
    if reason := X86Backend.can_run(rounded):
        pytest.skip(reason)
    return rounded


def load(layer, tensors):
    """Through vLLM's weight loaders."""
    for name, tensor in tensors.items():
        getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    layer.quant_method.process_weights_after_loading(layer)


def test_activations_in_8_bits_are_for_who_can_round_them(rounded, logged, monkeypatch):
    assert choose(rounded, None, "fc", "rounded").plan.int8_inputs
    (_, text), *_ = logged
    assert text.endswith("x86 (first that can run; activations in 8 bits, as asked for)")
    with pytest.raises(ServingError, match=r"\(dense: has no 8-bit activations\)$"):
        choose(rounded, "dense", "fc", "row")
    monkeypatch.setattr(library, "supported_isas", lambda: ("avx2", "avx512"))
    with pytest.raises(ServingError, match=r"x86: 8-bit activations need AVX-512 with VNNI"):
        choose(rounded, None, "fc", "row")


@pytest.mark.usefixtures("rounded")
def test_activations_in_8_bits_change_a_product_a_little(tiny, config_of, rank):
    tensors = tiny.random_packed(tiny.ROW, 32, 160)
    x = torch.randn(3, 160)
    results = []
    for ours in ({}, {"activations": "int8"}):
        with rank(additional_config={"precalib": ours}):
            layer = ReplicatedLinear(
                160, 32, False, quant_config=config_of("fc"), prefix="fc", return_bias=False
            )
        load(layer, tensors)
        results.append(layer(x))
    exact, rounded = results
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < float(error) < 0.02


@pytest.mark.parametrize("ours", ["dense", {"backends": "dense"}, {"activations": "int4"}])
def test_anything_else_in_additional_config_is_refused(config_of, rank, ours):
    with (
        rank(additional_config={"precalib": ours}),
        pytest.raises(ServingError, match=r'^additional_config: "precalib" is .* is known$'),
    ):
        ReplicatedLinear(160, 32, quant_config=config_of("fc"), prefix="fc")


@pytest.fixture
def config_of(tiny):
    from precalib_kernels.format.checkpoint_config import CheckpointConfig

    def make(*modules):
        return PrecalibConfig(CheckpointConfig("t", tiny.LAYOUTS, dict.fromkeys(modules, "row")))

    return make


def test_the_choice_is_logged_once_with_its_reason(spec, logged):
    table = (Fussy, DenseBackend)
    for where in ("first", "second"):
        choose(spec, None, where, "once", table)
    choose(spec, None, "third", "another", table)
    choose(spec, "dense", "fourth", "another", table)
    reason = "first that can run; fussy: needs a quantum computer, not a cpu"
    assert logged == [
        ("INFO", f"precalib computes layout once with backend dense ({reason})"),
        ("INFO", f"precalib computes layout another with backend dense ({reason})"),
        ("INFO", "precalib computes layout another with backend dense (asked for)"),
    ]


@pytest.mark.parametrize("name", ["row", "sign", "min-max", "plain", "trellis"])
def test_unpacking_in_pieces_changes_nothing(tiny, monkeypatch, name):
    layout = tiny.LAYOUTS[name]
    parts = [tiny.random_packed(layout, rows, 160, seed=rows) for rows in (48, 17, 1)]
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    whole = torch.cat([dequantize(part, layout, 160) for part in parts])
    monkeypatch.setattr(backends, "CHUNK_WEIGHTS", 5 * 160)
    for dtype in (torch.float32, torch.bfloat16):
        spec = LinearSpec(layout, 160, (48, 17, 1), dtype, "cpu")
        prepared = DenseBackend(spec).prepare(tensors, "fc")
        assert torch.equal(prepared["weight"], whole.to(dtype))


def test_each_backend_keeps_only_its_own_form(tiny, config_of, rank):
    tensors = tiny.random_packed(tiny.ROW, 32, 160)
    kept = {}
    for backend in ("x86", "dense", "reference"):
        with rank(additional_config={"precalib": {"backend": backend}}):
            layer = ReplicatedLinear(160, 32, False, quant_config=config_of("fc"), prefix="fc")
        load(layer, tensors)
        kept[backend] = {name for name, _ in layer.named_parameters()}
    native = {"qweight", "plan"}
    assert kept == {"x86": native, "dense": {"weight"}, "reference": set(tensors)}


def test_a_backend_of_its_own_in_memory_form_is_one_class(tiny, config_of, rank, monkeypatch):
    """The slot for native kernels: other tensors under other names, and its own product."""

    class Transposed(Backend):
        name = "transposed"

        @staticmethod
        def can_run(spec):
            return None if spec.device == "cpu" else "needs a CPU"

        def prepare(self, tensors, where):
            weight = torch.cat([rows for _, rows in unpacked_rows(tensors, self.spec, where)])
            return {"qweight": weight.T.contiguous(), "factor": torch.tensor([2.0])}

        def apply(self, layer, x, bias):
            y = x @ layer.qweight / layer.factor * 2
            return y if bias is None else y + bias

    monkeypatch.setattr(choose, "__defaults__", ((Transposed, DenseBackend),))
    tensors = tiny.random_packed(tiny.ROW, 32, 160)
    with rank():
        layer = ReplicatedLinear(
            160, 32, False, quant_config=config_of("fc"), prefix="fc", return_bias=False
        )
    load(layer, tensors)
    assert {name for name, _ in layer.named_parameters()} == {"qweight", "factor"}
    weight = dequantize(tensors, tiny.ROW, 160)
    torch.testing.assert_close(layer(torch.eye(160)), weight.T)


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_former_names_are_understood(spec, former, name):
    known = {backend.name: backend for backend in backends.BACKENDS}
    if reason := known[name].can_run(spec):
        with pytest.raises(ServingError, match=f"{name}: {re.escape(reason)}"):
            choose(spec, former, "fc", "row")
    else:
        assert choose(spec, former, "fc", "row").name == name
