"""Layers whose names the checkpoint does not have are recognized by the tensors that arrive."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.reference import dequantize
from vllm_precalib.config import PrecalibConfig
from vllm_precalib.linear_method import PrecalibLinearMethod


def config(layouts):
    return PrecalibConfig(CheckpointConfig("test", layouts, {"elsewhere": next(iter(layouts))}))


def load(layer, tensors, shard=None):
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, *([] if shard is None else [shard]))


def process(layer):
    layer.quant_method.process_weights_after_loading(layer)


def weight_of(layer):
    columns = layer.quant_method.spec.input_size
    return layer.quant_method.apply(layer, torch.eye(columns)).T


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_parts_are_put_together(tiny, rank, ranks, additional):
    rows = {"q": 128, "k": 64, "v": 64}
    parts = {part: tiny.random_packed(tiny.ROW, n, 160, seed=n) for part, n in rows.items()}
    whole = [dequantize(tensors, tiny.ROW, 160) for tensors in parts.values()]
    for index in range(ranks):
        with rank(index, of=ranks, additional_config=additional):
            layer = QKVParallelLinear(
                160, 32, 4, 2, bias=False, quant_config=config({"row": tiny.ROW}), prefix=""
            )
            for part, tensors in parts.items():
                load(layer, tensors, part)
            process(layer)
        assert isinstance(layer.quant_method, PrecalibLinearMethod)
        expected = torch.cat([part.chunk(ranks)[index] for part in whole])
        torch.testing.assert_close(weight_of(layer), expected)


def test_the_layout_is_told_by_its_tensors(tiny, rank):
    layouts = {name: tiny.LAYOUTS[name] for name in ("row", "sign", "min-max", "plain")}
    for name, layout in layouts.items():
        with rank():
            layer = RowParallelLinear(
                160, 48, bias=False, quant_config=config(layouts), prefix="other.name"
            )
            load(layer, tiny.random_packed(layout, 48, 160))
            process(layer)
        assert layer.quant_method.module.layout_name == name


def test_two_layouts_of_the_same_shapes_are_refused(tiny, rank):
    layouts = {"balanced-3": tiny.LAYOUTS["balanced-3"]}
    fields = layouts["balanced-3"].to_dict()
    fields["levels"] = [level // 2 | 1 for level in fields["levels"]]
    layouts["other"] = type(tiny.ROW).from_dict(fields)
    with rank():
        layer = RowParallelLinear(256, 48, bias=False, quant_config=config(layouts), prefix="a.b")
        load(layer, tiny.random_packed(layouts["other"], 48, 256))
        with pytest.raises(
            ServingError, match=r"^a\.b: .* more than one layout \(balanced-3, other\); quantize"
        ):
            process(layer)


def test_tensors_of_no_layout_are_refused(tiny, rank):
    with rank():
        layer = RowParallelLinear(
            160, 48, bias=False, quant_config=config({"row": tiny.ROW}), prefix=""
        )
        tensors = tiny.random_packed(tiny.ROW, 48, 160)
        tensors["qweight"] = tensors["qweight"][:, 1:]
        load(layer, tensors)
        with pytest.raises(ServingError, match=r"^a layer without a name: .* could be of none; "):
            process(layer)


def test_a_part_that_did_not_arrive_is_missed(tiny, rank):
    with rank():
        layer = MergedColumnParallelLinear(
            160, [32, 32], bias=False, quant_config=config({"row": tiny.ROW}), prefix="a.b"
        )
        load(layer, tiny.random_packed(tiny.ROW, 32, 160), 0)
        with pytest.raises(ServingError, match=r"^a\.b\.qweight was not in the checkpoint; "):
            process(layer)


def test_nothing_is_left_behind_at_an_unquantized_layer(tiny, rank):
    with rank():
        layer = RowParallelLinear(
            160, 48, bias=False, quant_config=config(tiny.LAYOUTS), prefix="a.b"
        )
        assert sum(p.numel() for p in layer.parameters()) > 48 * 160
        load(layer, {"weight": torch.ones(48, 160)})
        process(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
