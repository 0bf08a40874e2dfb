"""When vLLM's own kernels are taken, and what they are given; products: tests/kernels/gpu."""

import dataclasses

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision import machete, marlin
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.triton import backend as triton_backend
from precalib_kernels.backends.triton import salient_op
from precalib_kernels.backends.triton.backend import WarmUps
from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import unpack_bits
from precalib_kernels.format.layout import Layout
from vllm_precalib import mixed_precision_backend
from vllm_precalib.backends import plugin_registry
from vllm_precalib.mixed_precision_backend import MixedPrecisionBackend

PLAIN, SALIENT = RECIPE_LAYOUTS["rtn-4"], RECIPE_LAYOUTS["paper-4"]
SCALED = Layout(4, 64, scale="log8", column_scale=True)
SPEC = LinearSpec(PLAIN, 4096, (4096,), torch.bfloat16, "cuda")


@pytest.fixture
def card(monkeypatch, rank):
    """vLLM takes this machine for one with a card of that compute capability."""
    kind = type(current_platform)

    def pretend(major: int, minor: int = 0) -> None:
        monkeypatch.setattr(kind, "_enum", PlatformEnum.CUDA)
        monkeypatch.setattr(
            kind,
            "get_device_capability",
            classmethod(lambda *_, **__: DeviceCapability(major, minor)),
        )
        monkeypatch.setattr(triton_backend, "has_triton", lambda: True)
        monkeypatch.setattr(triton_backend, "compute_capability", lambda: (major, minor))

    with rank():
        yield pretend


class Recorded(MPLinearKernel):
    """Multiplies by the weight that it was given, unpacked as compressed-tensors packs it."""

    @classmethod
    def get_min_capability(cls):
        return 0

    @classmethod
    def can_implement(cls, _):
        return True, None

    def process_weights_after_loading(self, layer):
        self.given = dict(layer.named_parameters())
        for name, parameter in self.given.items():
            layer.register_parameter(name, torch.nn.Parameter(parameter + 0, requires_grad=False))

    def weight(self, layer):
        words, steps, zeros = self._get_weight_params(layer)
        k, n = self.config.partition_weight_shape
        codes = unpack_bits(words.data.view(torch.uint8), 4, k)
        zeros = unpack_bits(zeros.data.T.contiguous().view(torch.uint8), 4, n).T
        group = self.config.group_size
        return (codes.float() - zeros.repeat_interleave(group, 1)) * steps.repeat_interleave(
            group, 1
        ).float()

    def apply_weights(self, layer, x, bias=None):
        assert bias is None
        return (x.float() @ self.weight(layer).T).to(x.dtype)


@pytest.fixture
def recorded(monkeypatch, rank):
    monkeypatch.setattr(mixed_precision_backend, "choose_mp_linear_kernel", lambda _: Recorded)
    monkeypatch.setattr(mixed_precision_backend, "KNOWN", ("Recorded",))
    with rank():
        yield


def loaded(spec, tensors):
    backend = MixedPrecisionBackend(spec)
    layer = torch.nn.Module()
    for name, tensor in backend.prepare(tensors, "fc").items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    backend.finish(layer)
    return backend, layer


@pytest.mark.parametrize(
    ("capability", "size", "kernel"),
    [
        ((7, 5), 4096, "Marlin"),
        ((8, 0), 4096, "Marlin"),
        ((9, 0), 4096, "Machete"),
        ((9, 0), 4104, "Marlin"),
        ((12, 0), 4096, "Marlin"),
    ],
)
def test_it_takes_what_vllm_takes(card, capability, size, kernel):
    card(*capability)
    spec = dataclasses.replace(SPEC, layout=SALIENT, shard_sizes=(size,), dtype=torch.float16)
    assert MixedPrecisionBackend.can_run(spec) is None
    assert mixed_precision_backend.kernel_for(spec, size)[0].__name__ == f"{kernel}LinearKernel"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "computes on GPUs, not on cpu"),
        ({"dtype": torch.float32}, "not in torch.float32"),
        ({"layout": RECIPE_LAYOUTS["rtn-3"]}, "for 4-bit codes, not for 3 bits"),
        ({"layout": RECIPE_LAYOUTS["balanced-4"]}, "uniform levels only, not a trellis"),
        (
            {"layout": Layout(4, 128, tuple(range(-120, 121, 16)))},
            "uniform levels only, not a table of levels",
        ),
        ({"shard_sizes": (4096, 17)}, "rows in eights, which 4113 is not"),
        (
            {"shard_sizes": (20, 20), "layout": dataclasses.replace(PLAIN, column_scale=True)},
            "rows in eights, which 20 is not",  # though the sum of both is
        ),
        (
            {"layout": Layout(4, 96)},
            "vLLM has no kernel of its own: CutlassW4A8LinearKernel requires capability 90; "
            "MacheteLinearKernel requires capability 90; "
            "MarlinLinearKernel: Group size (96) not supported by Marlin;",
        ),
    ],
)
def test_it_says_why_not(card, change, reason):
    card(8)
    assert reason in MixedPrecisionBackend.can_run(dataclasses.replace(SPEC, **change))


def test_without_triton_there_are_no_salient_weights(card, monkeypatch):
    card(8)
    monkeypatch.setattr(triton_backend, "has_triton", lambda: False)
    assert MixedPrecisionBackend.can_run(SPEC) is None
    assert "need Triton" in MixedPrecisionBackend.can_run(dataclasses.replace(SPEC, layout=SALIENT))


def test_a_kernel_of_another_layout_is_refused(recorded, monkeypatch):
    monkeypatch.setattr(mixed_precision_backend, "KNOWN", ())
    assert "vLLM chooses Recorded, whose layout" in MixedPrecisionBackend.can_run(SPEC)


def test_it_is_next_when_triton_refuses(card):
    card(7, 5)  # too old for triton
    spec = dataclasses.replace(SPEC, dtype=torch.float16)
    registry = plugin_registry()
    choice = registry.choose(spec)
    assert choice.backend is MixedPrecisionBackend
    assert choice.reasons["triton"] == "needs compute capability 8.0"
    assert registry.choose(SPEC, "vllm_mixed_precision").backend is MixedPrecisionBackend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [PLAIN, SALIENT, SCALED], ids=["plain", "salient", "scaled"])
@pytest.mark.parametrize("columns", [128, 96, 576])
def test_the_kernel_is_given_the_base_weights(recorded, tiny, layout, dtype, columns):
    """All but the rounding of a scale; a ragged last group is filled."""
    spec = LinearSpec(layout, columns, (16, 8), dtype, "cuda")
    tensors = tiny.random_packed(layout, 24, columns)
    base = reference.base_values(tensors, layout, columns)
    if layout.column_scale:
        tensors["column_scale"] = tensors["column_scale"].repeat(2, 1)
    backend, layer = loaded(spec, tensors)
    weight = torch.cat([p.kernel.weight(layer) for p in backend.products])[:, :columns]
    eps = torch.finfo(dtype).eps / 2
    tiny_step = 16 * torch.finfo(dtype).smallest_normal * eps
    assert ((weight - base).abs() <= eps * base.abs() * (1 + 2**-20) + tiny_step).all()
    assert ((weight - base).abs() > eps / 8 * base.abs()).any()  # the bound is not idle
    for given in (p.kernel.given for p in backend.products):
        kinds = [
            (v.input_dim, v.output_dim, getattr(v, "packed_dim", None)) for v in given.values()
        ]
        assert kinds == [(1, 0, 1), (1, 0, None), (1, 0, 0)]


def test_salient_weights_do_not_see_the_rounding_of_scales(recorded, tiny):
    tensors = tiny.random_packed(SALIENT, 16, 576)
    spec = LinearSpec(SALIENT, 576, (16,), torch.bfloat16, "cuda")
    backend, layer = loaded(spec, tensors)
    positions, values, unit = (layer.get_parameter(name).data for name in salient_op.NAMES)
    added = torch.zeros(16, 640)
    start = torch.arange(positions.shape[1]) // SALIENT.salient_count * 128
    added.scatter_add_(1, positions + start, values.float() * unit[:, None])
    weight = (backend.products[0].kernel.weight(layer) + added)[:, :576]
    exact = reference.dequantize(tensors, SALIENT, 576)
    column, _ = reference.salient_codes(tensors, SALIENT, 576, "")
    salient = torch.zeros(16, 577, dtype=torch.bool).scatter_(1, column, True)[:, :576]
    assert ((weight - exact).abs() <= 2**-11 * added[:, :576].abs() + 2**-20)[salient].all()
    assert ((weight - exact).abs() > 2**-11 * exact.abs())[~salient].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_products_without_salient_weights(recorded, tiny, layout, bias):
    parts = (16, 8)
    tensors = tiny.random_packed(layout, 24, 96)
    if layout.column_scale:
        tensors["column_scale"] = torch.cat([tensors["column_scale"], torch.ones(1, 96).half()])
    backend, layer = loaded(LinearSpec(layout, 96, parts, torch.float16, "cuda"), tensors)
    x = torch.randn(2, 3, 96).half()
    shift = torch.randn(24).half() if bias else None
    y = backend.apply(layer, x, shift)
    weight = reference.dequantize(tensors, layout, 96, parts)
    size = x.float().abs() @ weight.abs().T + (0 if shift is None else shift.float().abs())
    exact = reference.linear(x.float(), tensors, layout, shift, parts)
    assert y.shape == (2, 3, 24)
    # a scale, a scaled input, the product and its sum with the bias are rounded
    assert ((y - exact).abs() <= 4 * 2**-11 * size).all()


def test_a_reload_gives_the_same_names_and_shapes(recorded, tiny):
    backend = MixedPrecisionBackend(LinearSpec(SALIENT, 160, (16,), torch.float16, "cuda"))
    first, second = (backend.prepare(tiny.random_packed(SALIENT, 16, 160, s), "fc") for s in (0, 1))
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    assert not torch.equal(first["qweight"], second["qweight"])


def test_zero_points_that_do_not_fit_are_refused(recorded, tiny):
    tensors = tiny.random_packed(PLAIN, 8, 128)
    tensors["zeros"][3] = 16
    with pytest.raises(FormatError, match=r"^fc: 'zeros' holds 16, .* take another backend$"):
        MixedPrecisionBackend(LinearSpec(PLAIN, 128, (8,), torch.float16, "cuda")).prepare(
            tensors, "fc"
        )


def test_marlin_finds_codes_scales_and_zero_points(card, monkeypatch, tiny):
    card(8)
    seen = {}

    def repack(words, **sizes):
        seen["codes"] = unpack_bits(words.T.contiguous().view(torch.uint8), 4, sizes["size_k"])
        return words

    def keep(name):
        return lambda tensor, **_: seen.setdefault(name, tensor.clone())

    monkeypatch.setattr(marlin.ops, "gptq_marlin_repack", repack)
    monkeypatch.setattr(marlin, "marlin_permute_scales", keep("steps"))
    monkeypatch.setattr(marlin, "marlin_zero_points", keep("zeros"))
    tensors = tiny.random_packed(PLAIN, 64, 256)
    spec = LinearSpec(PLAIN, 256, (64,), torch.float16, "cuda")
    prepared = MixedPrecisionBackend(spec).prepare(tensors, "fc")
    assert set(prepared) == {"qweight", "scales", "zeros"}
    assert torch.equal(seen["codes"], unpack_bits(tensors["qweight"], 4, 256))
    assert torch.equal(seen["zeros"].T, tensors["zeros"].int())
    assert torch.equal(seen["steps"].T, (tensors["scales"].float() / 15).half())


def test_machete_finds_codes_scales_and_zero_points(card, monkeypatch, tiny):
    card(9)
    monkeypatch.setattr(machete.ops, "machete_prepack_B", lambda words, **_: words.T.contiguous())
    tensors = tiny.random_packed(PLAIN, 128, 256)
    spec = LinearSpec(PLAIN, 256, (128,), torch.float16, "cuda")
    prepared = MixedPrecisionBackend(spec).prepare(tensors, "fc")
    steps = (tensors["scales"].float() / 15).half()
    assert torch.equal(prepared["qweight"].view(torch.uint8), tensors["qweight"])
    assert torch.equal(prepared["scales"].T, steps)
    assert torch.equal(prepared["zeros"].T, -steps * tensors["zeros"])


def test_kinds_of_layers_are_warmed_up_once(recorded, monkeypatch):
    runs = []
    monkeypatch.setattr(
        MixedPrecisionBackend, "apply", lambda _, __, x, bias: runs.append((len(x), bias is None))
    )
    backend = MixedPrecisionBackend(LinearSpec(SALIENT, 128, (8,), torch.float16, "cuda"))
    warm_ups = WarmUps()
    for _ in range(3):
        mixed_precision_backend.warm_up(backend, torch.nn.Module(), torch.device("cpu"), warm_ups)
    assert runs == [(rows, without) for rows in (1, 8, 16, 32) for without in (True, False)]
