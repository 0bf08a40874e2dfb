"""The backends inside vLLM: their order, what users may say, what is logged and written down."""

import dataclasses
import json
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import ReplicatedLinear

from precalib_kernels.backends.arm import library as arm_library
from precalib_kernels.backends.arm.backend import ArmBackend
from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.reference import ReferenceBackend, unpacked_rows
from precalib_kernels.backends.registry import FORMER_NAMES, BackendRegistry
from precalib_kernels.backends.x86 import library as x86_library
from precalib_kernels.backends.x86.backend import X86Backend
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize
from vllm_precalib import dense_backend
from vllm_precalib.backends import Options, Run, choose, describe, plugin_registry
from vllm_precalib.config import PrecalibConfig
from vllm_precalib.dense_backend import DenseBackend


class Fussy(ReferenceBackend):
    """Runs on nothing that exists."""

    name = "fussy"

    @classmethod
    def can_run(cls, spec):
        return f"needs a quantum computer, not a {spec.device}"


@pytest.fixture
def spec(tiny):
    return LinearSpec(tiny.ROW, 160, (48,), torch.float32, "cpu")


@pytest.fixture
def config_of(tiny):
    """Makes the configuration of a checkpoint whose modules are packed as "row"."""

    def make(*modules, registry=None):
        checkpoint = CheckpointConfig("t", tiny.LAYOUTS, dict.fromkeys(modules, "row"))
        return PrecalibConfig(checkpoint, registry)

    return make


@pytest.fixture
def make_layer(config_of, rank):
    """Makes the layer "fc" [32, 160], packed as "row", in an engine with these options."""

    def make(ours=None, registry=None, **more):
        config = config_of("fc", registry=registry)
        with rank(additional_config={"precalib": ours or {}}):
            options = {"quant_config": config, "prefix": "fc", "return_bias": False, **more}
            return ReplicatedLinear(160, 32, False, **options), config

    return make


def load(layer, tensors):
    """Through vLLM's weight loaders."""
    for name, tensor in tensors.items():
        getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    layer.quant_method.process_weights_after_loading(layer)


def test_the_order_of_backends(spec):
    """The one that reads packed weights first; `dense` before what is only for comparison."""
    names = ("x86", "arm", "triton", "vllm_mixed_precision", "dense", "reference")
    assert plugin_registry().names == names
    reasons = plugin_registry().reasons(spec)
    assert reasons["triton"] == reasons["vllm_mixed_precision"] == "computes on GPUs, not on cpu"
    assert reasons["dense"] is None
    assert reasons["reference"] is None
    assert reasons["x86"] == X86Backend.can_run(spec)
    assert reasons["arm"] == ArmBackend.can_run(spec)
    assert dict(describe()) == reasons


def test_without_kernels_a_cpu_takes_dense(spec):
    compiled = (X86Backend, ArmBackend)
    others = BackendRegistry(kind for kind in plugin_registry() if kind not in compiled)
    assert choose(spec, Options(), others, "fc", "row").backend is DenseBackend


@pytest.fixture
def aarch64(monkeypatch):
    """A machine with an Arm processor of the given ISAs, as the libraries see it."""

    def pretend(*isas):
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        for library in (x86_library, arm_library):
            for name in ("load", "supported_isas"):
                monkeypatch.setattr(library, name, getattr(library, name).__wrapped__)
        names = [isa.name for isa in arm_library.ISAS]
        has = SimpleNamespace(
            precalib_isa_index=lambda name: names.index(name.decode()),
            precalib_isa_state=lambda isa: 3 if names[isa] in isas else 1,
        )
        monkeypatch.setattr(arm_library, "load", lambda: has)

    return pretend


def test_on_aarch64_the_arm_backend_is_taken(spec, aarch64):
    aarch64("dotprod")
    reasons = dict(describe())
    assert reasons["arm"] is None
    assert reasons["x86"] == "the kernels are for x86-64, this is aarch64"
    choice = choose(spec, Options(), plugin_registry(), "fc", "row")
    assert choice.backend is ArmBackend
    assert choice.reason == f"first that can run; x86: {reasons['x86']}"
    rounded = dataclasses.replace(spec, int8_activations=True)
    assert choose(rounded, Options(), plugin_registry(), "fc", "row").backend is ArmBackend


def test_an_old_arm_processor_takes_dense(spec, aarch64):
    aarch64()
    reason = "needs the dot product instructions of Armv8.2 (asimddp)"
    assert dict(describe())["arm"] == reason
    choice = choose(spec, Options(), plugin_registry(), "fc", "row")
    assert choice.backend is DenseBackend
    assert choice.reasons["arm"] == reason


def test_who_cannot_compute_experts_says_so(spec):
    reasons = plugin_registry().reasons(dataclasses.replace(spec, experts=4))
    assert reasons["vllm_mixed_precision"] == "computes one matrix per layer, not 4 experts"
    assert reasons["dense"] is None


def test_one_that_cannot_run_is_refused_with_the_layer(spec):
    registry = BackendRegistry((Fussy, DenseBackend))
    with pytest.raises(
        ServingError,
        match=r"^a\.fc: no backend can run this layer \(fussy: needs a quantum computer, not a cpu",
    ):
        choose(spec, Options("fussy"), registry, "a.fc", "row")


def test_an_unknown_one_is_refused_with_the_option(spec):
    known = "x86, arm, triton, vllm_mixed_precision, dense, reference"
    with pytest.raises(
        ServingError,
        match=r'^additional_config \{"precalib": \{"backend": "turbo"\}\}: '
        rf"there is no such backend; choose one of {known}$",
    ):
        choose(spec, Options("turbo"), plugin_registry(), "a.fc", "row")


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_former_names_are_understood(spec, former, name):
    registry = plugin_registry()
    if reason := registry.reasons(spec)[name]:
        with pytest.raises(ServingError, match=f"{name}: {re.escape(reason)}"):
            choose(spec, Options(former), registry, "fc", "row")
    else:
        assert choose(spec, Options(former), registry, "fc", "row").backend.name == name


def test_options():
    assert Options.parse({}) == Options.parse({"precalib": {}, "other": 1}) == Options()
    ours = {"backend": "dense", "activations": "int8", "choices_file": "/tmp/choices"}
    assert Options.parse({"precalib": ours}) == Options("dense", True, Path("/tmp/choices"))
    address = "http://127.0.0.1:8001"
    assert Options.parse({"precalib": {"against": address}}) == Options(against=address)


@pytest.mark.parametrize(
    "ours",
    [
        "dense",
        {"backends": "dense"},
        {"activations": "int4"},
        {"choices_file": 3},
        {"against": "file:///etc/passwd"},
        {"against": 3},
    ],
)
def test_anything_else_in_additional_config_is_refused(config_of, rank, ours):
    with (
        rank(additional_config={"precalib": ours}),
        pytest.raises(
            ServingError,
            match=r'^additional_config: "precalib" is .* is known, and for a checkpoint',
        ),
    ):
        ReplicatedLinear(160, 32, quant_config=config_of("fc"), prefix="fc")


def test_the_choice_is_logged_once_with_its_reason(spec, logged):
    registry = BackendRegistry((Fussy, DenseBackend))
    for where in ("first", "second"):
        choose(spec, Options(), registry, where, "once")
    choose(spec, Options(), registry, "third", "another")
    choose(spec, Options("dense"), registry, "fourth", "another")
    reason = "first that can run; fussy: needs a quantum computer, not a cpu"
    assert logged == [
        ("INFO", f"precalib computes layout once with backend dense ({reason})"),
        ("INFO", f"precalib computes layout another with backend dense ({reason})"),
        ("INFO", "precalib computes layout another with backend dense (asked for)"),
    ]


def test_the_choice_is_recorded_for_every_layer(make_layer, tiny):
    layer, config = make_layer({"backend": "dense"})
    choice = config.choices["fc"]
    assert set(config.choices) == {"fc"}
    assert choice.backend is DenseBackend
    assert choice.spec == layer.quant_method.spec
    assert choice.spec.layout == tiny.ROW


def test_choices_are_written_to_a_file(make_layer, tmp_path):
    file = tmp_path / "choices.jsonl"
    for backend in ("dense", "reference"):
        _, config = make_layer({"backend": backend, "choices_file": str(file)})
    first, second = map(json.loads, file.read_text().splitlines())
    assert first.pop("run") != second.pop("run")  # started anew each time
    assert second == {"layer": "fc", "layout_name": "row", "rank": 0, "model": ""} | (
        config.choices["fc"].to_dict()
    )
    assert first["backend"] == "dense"
    assert first["reasons"]["reference"] == "dense was asked for"


@pytest.mark.parametrize("name", ["12", "12_dp3"])
def test_all_engines_of_a_start_record_one_run(name):
    config = SimpleNamespace(model_config=SimpleNamespace(model="org/m"), instance_id=name)
    assert Run.of(config) == Run("org/m", "12")


def test_a_file_that_cannot_be_written_is_named(make_layer, tmp_path):
    file = tmp_path / "missing" / "choices.jsonl"
    with pytest.raises(
        ServingError, match=r'^additional_config: "choices_file" .*choices.jsonl cannot be written'
    ):
        make_layer({"choices_file": str(file)})


def test_activations_in_8_bits_change_a_product_a_little(make_layer, tiny, spec):
    if reason := X86Backend.can_run(dataclasses.replace(spec, int8_activations=True)):
        pytest.skip(reason)
    tensors = tiny.random_packed(tiny.ROW, 32, 160)
    x = torch.randn(3, 160)
    results = []
    for ours in ({}, {"activations": "int8"}):
        layer, _ = make_layer(ours)
        load(layer, tensors)
        results.append(layer(x))
    exact, rounded = results
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < float(error) < 0.02


@pytest.mark.parametrize("native", [True, False])
def test_dense_products_are_in_float32_where_16_bits_are_emulated(tiny, spec, monkeypatch, native):
    monkeypatch.setattr(dense_backend, "has_bfloat16", lambda: native)
    spec = dataclasses.replace(spec, dtype=torch.bfloat16)
    choice = BackendRegistry((DenseBackend,)).choose(spec)
    assert ("weights take 4 bytes each" in choice.reason) != native
    tensors = tiny.random_packed(tiny.ROW, 48, 160)
    backend = choice.make()
    prepared = backend.prepare(tensors, "fc")
    assert prepared["weight"].dtype == (torch.bfloat16 if native else torch.float32)
    if native:
        return
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(prepared["weight"], requires_grad=False)
    backend.finish(layer)
    x, bias = torch.randn(3, 160).bfloat16(), torch.randn(48).bfloat16()
    expected = x.float() @ dequantize(tensors, tiny.ROW, 160).T
    assert torch.equal(backend.apply(layer, x, bias), (expected + bias.float()).bfloat16())
    assert DenseBackend.expectation(dataclasses.replace(spec, dtype=torch.float32)) is None


@pytest.mark.parametrize("name", ["row", "sign", "min-max", "plain", "trellis"])
def test_dense_weights_are_the_reference_rounded_once(tiny, name):
    layout = tiny.LAYOUTS[name]
    parts = [tiny.random_packed(layout, rows, 160, seed=rows) for rows in (48, 17, 1)]
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    whole = torch.cat([dequantize(part, layout, 160) for part in parts])
    for dtype in (torch.float32, torch.bfloat16):
        spec = LinearSpec(layout, 160, (48, 17, 1), dtype, "cpu")
        prepared = DenseBackend(spec).prepare(tensors, "fc")
        assert torch.equal(prepared["weight"], whole.to(prepared["weight"].dtype))


def test_each_backend_keeps_only_its_own_tensors(make_layer, tiny, additional):
    tensors = tiny.random_packed(tiny.ROW, 32, 160)
    layer, _ = make_layer(additional["precalib"])
    load(layer, tensors)
    kept = {"x86": {"qweight", "x86_layout"}, "dense": {"weight"}, "reference": set(tensors)}
    names = {name for name, _ in layer.named_parameters()}
    assert names == kept[additional["precalib"]["backend"]]


def test_a_backend_of_its_own_is_one_class(make_layer, tiny):
    """Other tensors under other names, and its own product; the registry is the caller's."""

    class Transposed(Backend):
        name = "transposed"

        def prepare(self, tensors, where):
            weight = torch.cat([rows for _, rows in unpacked_rows(tensors, self.spec, where)])
            return {"qweight": weight.T.contiguous(), "factor": torch.tensor([2.0])}

        def apply(self, layer, x, bias):
            y = x @ layer.qweight / layer.factor * 2
            return y if bias is None else y + bias

    tensors = tiny.random_packed(tiny.ROW, 32, 160)
    layer, config = make_layer(registry=BackendRegistry((Transposed, DenseBackend)))
    load(layer, tensors)
    assert config.choices["fc"].reasons == {"dense": "lower priority"}
    assert {name for name, _ in layer.named_parameters()} == {"qweight", "factor"}
    weight = dequantize(tensors, tiny.ROW, 160)
    torch.testing.assert_close(layer(torch.eye(160)), weight.T)
