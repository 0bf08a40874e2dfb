"""A packed layer that vLLM quantizes again: it is loaded as ever and dequantized once."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from precalib_kernels.errors import FormatError, ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize
from vllm_precalib.config import PrecalibConfig

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
NAMES = ["row", "sign", "min-max", "plain", "trellis"]


@register_weight_loader_v2_supported_method  # from 0.33 on vLLM looks at the checkpoint's method
class KeepsWeight(OnlineLinearBase):
    """Quantizes the weight it is given to itself: what vLLM's own methods get is kept to look at.

    Those need instructions that not every machine has.
    """

    def process_weights_after_loading(self, layer):
        layer.dense = self.get_weight_for_quantization(layer)
        self.release_requantization_source_weights(layer)

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.dense, bias)


@pytest.fixture
def options(tiny, rank, monkeypatch):
    """Arguments of vLLM's layers; `again=False` for a model that is not quantized again."""

    def make(dtype=torch.float32, again=True, **modules):
        config = PrecalibConfig(CheckpointConfig("test", tiny.LAYOUTS, modules))
        config.packed_modules_mapping = FUSED
        if again:
            config.online_quantization_config = SimpleNamespace(
                resolve_quant_method_cls=lambda *_: KeepsWeight,
                get_quant_method=lambda *_: KeepsWeight(),
            )
        return {"quant_config": config, "bias": False, "params_dtype": dtype}

    monkeypatch.setattr(
        "vllm.model_executor.layers.quantization.online.fp8.get_current_vllm_config",
        lambda: SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32)),
    )
    return make


def load(layer, tensors, shard=None):
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *([] if shard is None else [shard]))


def requantized(layer):
    """The weight that vLLM's method got; nothing packed is left."""
    layer.quant_method.process_weights_after_loading(layer)
    assert not dict(layer.named_parameters())
    return layer.dense


@pytest.mark.parametrize("name", NAMES)
def test_plain_layers(tiny, rank, options, name):
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 24, 160)
    with rank():
        layer = ReplicatedLinear(160, 24, prefix="fc", **options(fc=name))
    load(layer, tensors)
    assert torch.equal(requantized(layer), dequantize(tensors, layout, 160))
    x = torch.randn(3, 160)
    torch.testing.assert_close(layer(x)[0], x @ dequantize(tensors, layout, 160).T)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_gets_its_slice(tiny, rank, options, name):
    layout = tiny.LAYOUTS[name]
    up, down = tiny.random_packed(layout, 48, 160), tiny.random_packed(layout, 40, 256)
    rows, columns = dequantize(up, layout, 160), dequantize(down, layout, 256)
    for index in range(2):
        with rank(index, of=2):
            first = ColumnParallelLinear(160, 48, prefix="up", **options(up=name))
            second = RowParallelLinear(256, 40, prefix="down", **options(down=name))
        load(first, up)
        load(second, down)
        assert torch.equal(requantized(first), rows[24 * index :][:24])
        assert torch.equal(requantized(second), columns[:, 128 * index :][:, :128])


@pytest.mark.parametrize("name", NAMES)
def test_fused_layers(tiny, rank, options, name):
    layout = tiny.LAYOUTS[name]
    parts = [tiny.random_packed(layout, rows, 160, seed=rows) for rows in (128, 64, 64)]
    q, k, v = (dequantize(tensors, layout, 160) for tensors in parts)
    qkv_names, gate_up_names = (dict.fromkeys(FUSED[fused], name) for fused in FUSED)
    for index in range(2):
        with rank(index, of=2):
            qkv = QKVParallelLinear(160, 32, 4, 2, prefix="qkv_proj", **options(**qkv_names))
            merged = MergedColumnParallelLinear(
                160, [64, 64], prefix="gate_up_proj", **options(**gate_up_names)
            )
        for shard, tensors in zip("qkv", parts, strict=True):
            load(qkv, tensors, shard)
        for shard in range(2):
            load(merged, parts[1 + shard], shard)
        slices = q[64 * index :][:64], k[32 * index :][:32], v[32 * index :][:32]
        assert torch.equal(requantized(qkv), torch.cat(slices))
        assert torch.equal(requantized(merged), torch.cat(slices[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_output_head(tiny, rank, options, name):
    """vLLM keeps a head as it is stored; its weight can be had all the same."""
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 100, 160)
    padded = torch.zeros(128, 160)
    padded[:100] = dequantize(tensors, layout, 160)
    for index in range(2):
        with rank(index, of=2):
            config = options(lm_head=name)["quant_config"]
            layer = ParallelLMHead(
                100, 160, params_dtype=torch.float32, quant_config=config, prefix="lm_head"
            )
        load(layer, tensors)
        weight = layer.quant_method.dequantize_weight(layer)
        assert torch.equal(weight, padded[64 * index :][:64])


def test_in_the_type_of_the_activations(tiny, rank, options):
    tensors = tiny.random_packed(tiny.MIN_MAX, 24, 160)
    with rank():
        layer = ReplicatedLinear(160, 24, prefix="fc", **options(torch.bfloat16, fc="min-max"))
    load(layer, tensors)
    weight = requantized(layer)
    assert torch.equal(weight, dequantize(tensors, tiny.MIN_MAX, 160).bfloat16())


def test_no_backend_is_named_for_it(tiny, rank, options):
    more = options(fc="row")
    with rank():
        layer = ReplicatedLinear(160, 24, prefix="fc", **more)
    load(layer, tiny.random_packed(tiny.ROW, 24, 160))
    requantized(layer)
    assert more["quant_config"].choices == {}


def test_a_missing_tensor_is_refused(tiny, rank, options):
    tensors = tiny.random_packed(tiny.ROW, 24, 160)
    del tensors["scales"]
    with rank():
        layer = ReplicatedLinear(160, 24, prefix="fc", **options(fc="row"))
    load(layer, tensors)
    with pytest.raises(ServingError, match=r"^fc\.scales was not in the checkpoint"):
        requantized(layer)


def test_damaged_positions_are_refused(tiny, rank, options):
    tensors = tiny.random_packed(tiny.ROW, 24, 160)
    tensors["salient"][:] = 255
    with rank():
        layer = ReplicatedLinear(160, 24, prefix="fc", **options(fc="row"))
    load(layer, tensors)
    with pytest.raises(FormatError, match=r"^fc"):
        requantized(layer)


def test_a_layer_that_has_its_backend_cannot_be_quantized_again(tiny, rank, options):
    with rank():
        layer = ReplicatedLinear(160, 24, prefix="fc", **options(again=False, fc="row"))
    load(layer, tiny.random_packed(tiny.ROW, 24, 160))
    layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(ServingError, match=r"^fc cannot be quantized again by vLLM.* load"):
        layer.quant_method.dequantize_weight(layer)
