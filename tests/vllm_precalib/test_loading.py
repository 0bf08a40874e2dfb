"""Packed tensors through vLLM's own layers and loaders: every rank gets exactly its slice."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize
from vllm_precalib.config import PrecalibConfig

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
NAMES = ["row", "sign", "min-max", "plain", "trellis"]


@pytest.fixture
def config(tiny):
    def make(**modules):
        names = {module.replace("__", "."): layout for module, layout in modules.items()}
        result = PrecalibConfig(CheckpointConfig("test", tiny.LAYOUTS, names))
        result.packed_modules_mapping = FUSED
        return result

    return make


def load(layer, tensors, shard=None):
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *([] if shard is None else [shard]))


def unpacked(layer):
    """The weight that the layer's tensors mean, computed by the product with the identity."""
    layer.quant_method.process_weights_after_loading(layer)
    eye = torch.eye(layer.quant_method.columns.width)
    return layer.quant_method.apply(layer, eye).T


def options(config, **more):
    return {"quant_config": config, "bias": False, "params_dtype": torch.float32, **more}


@pytest.mark.parametrize("name", NAMES)
def test_column_parallel_takes_rows(tiny, config, rank, name, additional):
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 48, 160)
    whole = dequantize(tensors, layout, 160)
    for index in range(2):
        with rank(index, of=2, additional_config=additional):
            layer = ColumnParallelLinear(160, 48, prefix="up", **options(config(up=name)))
        load(layer, tensors)
        torch.testing.assert_close(unpacked(layer), whole[24 * index : 24 * (index + 1)])


@pytest.mark.parametrize("name", NAMES)
def test_row_parallel_takes_columns_at_group_boundaries(tiny, config, rank, name, additional):
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 40, 256)
    whole = dequantize(tensors, layout, 256)
    for index in range(2):
        with rank(index, of=2, additional_config=additional):
            layer = RowParallelLinear(256, 40, prefix="down", **options(config(down=name)))
        load(layer, tensors)
        torch.testing.assert_close(unpacked(layer), whole[:, 128 * index : 128 * (index + 1)])


RAGGED = [(160, 2), (160, 4), (192, 2), (288, 4), (384, 4), (96, 3), (64, 4)]  # K, ranks


@pytest.mark.parametrize(("columns", "ranks"), RAGGED)
def test_row_parallel_slices_may_cut_groups(tiny, config, rank, columns, ranks, additional):
    tensors = tiny.random_packed(tiny.TRELLIS, 40, columns)
    whole, width = dequantize(tensors, tiny.TRELLIS, columns), columns // ranks
    for index in range(ranks):
        with rank(index, of=ranks, additional_config=additional):
            layer = RowParallelLinear(columns, 40, prefix="down", **options(config(down="trellis")))
        load(layer, tensors)
        own = whole[:, width * index : width * (index + 1)]
        torch.testing.assert_close(unpacked(layer), own)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("columns", "ranks"), RAGGED)
def test_a_slice_has_exactly_the_values_of_the_file(tiny, config, rank, name, columns, ranks):
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 40, columns)
    slices = []
    for index in range(ranks):
        with rank(index, of=ranks):
            layer = RowParallelLinear(columns, 40, prefix="down", **options(config(down=name)))
        load(layer, tensors)
        held = sum(layer.get_parameter(name).nbytes for name in tensors)
        groups = columns // ranks // layout.group_size + 2
        assert held <= layout.stored_bytes(40, min(groups * layout.group_size, columns))
        slices.append(layer.quant_method.dequantize_weight(layer))
    assert torch.equal(torch.cat(slices, 1), dequantize(tensors, layout, columns))


@pytest.mark.parametrize("ragged", [96, 160])
def test_row_parallel_alone_may_be_ragged(tiny, config, rank, ragged, additional):
    tensors = tiny.random_packed(tiny.ROW, 40, ragged)
    with rank(additional_config=additional):
        layer = RowParallelLinear(ragged, 40, prefix="down", **options(config(down="row")))
    load(layer, tensors)
    torch.testing.assert_close(unpacked(layer), dequantize(tensors, tiny.ROW, ragged))


@pytest.mark.parametrize("name", NAMES)
def test_merged_parts_keep_their_own_column_scale(tiny, config, rank, name, additional):
    layout = tiny.LAYOUTS[name]
    parts = [tiny.random_packed(layout, rows, 160, seed=rows) for rows in (32, 64)]
    gate, up = (dequantize(tensors, layout, 160) for tensors in parts)
    packed = config(mlp__gate_proj=name, mlp__up_proj=name)
    for index in range(2):
        with rank(index, of=2, additional_config=additional):
            layer = MergedColumnParallelLinear(
                160, [32, 64], prefix="mlp.gate_up_proj", **options(packed)
            )
        for shard, tensors in enumerate(parts):
            load(layer, tensors, shard)
        rows = torch.cat([gate[16 * index :][:16], up[32 * index :][:32]])
        torch.testing.assert_close(unpacked(layer), rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_key_and_value_heads_are_copied_when_ranks_outnumber_them(
    tiny, config, rank, ranks, additional
):
    parts = {
        shard: tiny.random_packed(tiny.ROW, rows, 160, seed=rows)
        for shard, rows in {"q": 128, "k": 64, "v": 64}.items()
    }
    q, k, v = (dequantize(tensors, tiny.ROW, 160) for tensors in parts.values())
    packed = config(q_proj="row", k_proj="row", v_proj="row")
    for index in range(ranks):
        with rank(index, of=ranks, additional_config=additional):
            layer = QKVParallelLinear(160, 32, 4, 2, prefix="qkv_proj", **options(packed))
        for shard, tensors in parts.items():
            load(layer, tensors, shard)
        heads, shared = 128 // ranks, max(64 // ranks, 32)
        first = index * 64 // ranks // 32 * 32
        rows = [q[heads * index :][:heads], k[first:][:shared], v[first:][:shared]]
        torch.testing.assert_close(unpacked(layer), torch.cat(rows))


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_fused_in_the_checkpoint(tiny, config, rank, ranks, additional):
    qkv, gate_up = (tiny.random_packed(tiny.ROW, rows, 160, seed=rows) for rows in (256, 64))
    packed = config(qkv_proj="row", gate_up_proj="row")
    whole = dequantize(qkv, tiny.ROW, 160).split([128, 64, 64])
    halves = dequantize(gate_up, tiny.ROW, 160).split([32, 32])
    for index in range(ranks):
        with rank(index, of=ranks, additional_config=additional):
            attention = QKVParallelLinear(160, 32, 4, 2, prefix="qkv_proj", **options(packed))
            mlp = MergedColumnParallelLinear(
                160, [32, 32], prefix="gate_up_proj", **options(packed)
            )
        load(attention, qkv)
        load(mlp, gate_up)
        rows = torch.cat([part.chunk(ranks)[index] for part in whole])
        torch.testing.assert_close(unpacked(attention), rows)
        rows = torch.cat([part.chunk(ranks)[index] for part in halves])
        torch.testing.assert_close(unpacked(mlp), rows)


@pytest.mark.parametrize("name", NAMES)
def test_replicated(tiny, config, rank, name, additional):
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 24, 160)
    with rank(1, of=2, additional_config=additional):
        layer = ReplicatedLinear(160, 24, prefix="fc", **options(config(fc=name)))
    load(layer, tensors)
    torch.testing.assert_close(unpacked(layer), dequantize(tensors, layout, 160))


@pytest.mark.parametrize("name", NAMES)
def test_padded_output_head(tiny, config, rank, name, additional):
    layout = tiny.LAYOUTS[name]
    tensors = tiny.random_packed(layout, 100, 160)
    padded = torch.zeros(128, 160)
    padded[:100] = dequantize(tensors, layout, 160)
    for index in range(2):
        with rank(index, of=2, additional_config=additional):
            layer = ParallelLMHead(
                100,
                160,
                params_dtype=torch.float32,
                quant_config=config(lm_head=name),
                prefix="lm_head",
            )
        load(layer, tensors)
        torch.testing.assert_close(unpacked(layer), padded[64 * index :][:64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bias_and_type(tiny, config, rank, dtype, additional):
    tensors = tiny.random_packed(tiny.MIN_MAX, 48, 160)
    with rank(additional_config=additional):
        layer = ColumnParallelLinear(
            160, 48, prefix="up", quant_config=config(up="min-max"), params_dtype=dtype
        )
    load(layer, tensors)
    layer.bias.data = torch.randn(48, dtype=dtype)
    bias = layer.bias.data.double()
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(7, 160, dtype=dtype)
    y, _ = layer(x)
    assert y.dtype == dtype
    weight = dequantize(tensors, tiny.MIN_MAX, 160).double()
    exact = x.double() @ weight.T + bias
    # the weight and the result are rounded to dtype, and 160 products are added in float32
    units = 2 * torch.finfo(dtype).eps + 160**0.5 * torch.finfo(torch.float32).eps
    bound = units * (x.double().abs() @ weight.abs().T + bias.abs())
    assert ((y.double() - exact).abs() <= bound).all()
