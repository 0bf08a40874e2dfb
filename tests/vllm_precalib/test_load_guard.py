"""What is missing, cut, damaged or misplaced is refused by name before anything is served."""

import pytest
import torch
from vllm.config import LoadConfig
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from precalib_kernels.errors import FormatError, ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from vllm_precalib.config import PrecalibConfig

REFERENCE = {"precalib": {"backend": "reference"}}
DOWN = "model.layers.3.mlp.down_proj"


@pytest.fixture
def row_layer(tiny, rank):
    """Makes a RowParallelLinear and the packed tensors it wants."""

    def make(layout_name="row", columns=160, **options):
        config = PrecalibConfig(CheckpointConfig("test", tiny.LAYOUTS, {DOWN: layout_name}))
        with rank(**options):
            layer = RowParallelLinear(columns, 48, bias=False, quant_config=config, prefix=DOWN)
        return layer, tiny.random_packed(tiny.LAYOUTS[layout_name], 48, columns)

    return make


@pytest.fixture
def attention(tiny, rank):
    """Makes a layer fused from q, k and v, and the packed tensors of each."""

    def make():
        names = [f"attn.{part}_proj" for part in "qkv"]
        config = PrecalibConfig(CheckpointConfig("test", tiny.LAYOUTS, dict.fromkeys(names, "row")))
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        with rank():
            layer = QKVParallelLinear(
                160, 32, 4, 2, bias=False, quant_config=config, prefix="attn.qkv_proj"
            )
        rows = {"q": 128, "k": 64, "v": 64}
        return layer, {part: tiny.random_packed(tiny.ROW, n, 160) for part, n in rows.items()}

    return make


def load(layer, tensors, shard=None, skip=()):
    for name, tensor in tensors.items():
        if name not in skip:
            param = getattr(layer, name)
            param.weight_loader(param, tensor, *([] if shard is None else [shard]))


def process(layer):
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("layout_name", ["row", "sign", "min-max", "plain"])
def test_every_tensor_is_missed(tiny, row_layer, layout_name):
    for name in tiny.LAYOUTS[layout_name].tensors(48, 160):
        layer, tensors = row_layer(layout_name)
        load(layer, tensors, skip=[name])
        with pytest.raises(
            ServingError,
            match=rf"^model\.layers\.3\.mlp\.down_proj\.{name} was not in the checkpoint; ",
        ):
            process(layer)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_every_fused_part_is_missed(tiny, attention, part):
    for name in tiny.ROW.tensors(64, 160):
        layer, tensors = attention()
        for shard in "qkv":
            load(layer, tensors[shard], shard, skip=[name] if shard == part else [])
        with pytest.raises(ServingError, match=rf"^attn\.{part}_proj\.{name} was not in the"):
            process(layer)


def test_a_reload_has_to_bring_everything_again(row_layer):
    layer, tensors = row_layer(additional_config=REFERENCE)
    fresh = dict(layer.named_parameters())
    load(layer, tensors)
    process(layer)
    for name, param in fresh.items():
        delattr(layer, name)
        layer.register_parameter(name, param)
    load(layer, tensors, skip=["scales"])
    with pytest.raises(ServingError, match=r"down_proj\.scales was not in the checkpoint"):
        process(layer)


@pytest.mark.parametrize("change", ["rows", "columns", "more rows", "more columns", "type"])
@pytest.mark.parametrize("layout_name", ["row", "sign", "min-max"])
def test_wrong_shapes_and_types(tiny, row_layer, layout_name, change):
    changes = {
        "rows": lambda t: t[:-1],
        "columns": lambda t: t[:, :-1],
        "more rows": lambda t: torch.cat([t, t[:1]]),  # vLLM would take the first ones
        "more columns": lambda t: torch.cat([t, t[:, :1]], 1),
        "type": lambda t: t.float(),
    }
    for name in tiny.LAYOUTS[layout_name].tensors(48, 160):
        layer, tensors = row_layer(layout_name)
        tensors[name] = changes[change](tensors[name])
        with pytest.raises(
            ServingError,
            match=rf"^{DOWN}\.{name} is \[\d+, \d+\] torch\.\w+ in the checkpoint, expected \[",
        ):
            load(layer, tensors)


def test_a_fused_part_of_another_size_is_named(attention):
    layer, tensors = attention()
    with pytest.raises(ServingError, match=r"^attn\.k_proj\.qweight is \[128, 80\] .* \[64, 80\]"):
        load(layer, tensors["q"], "k")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout_name", ["row", "sign", "min-max"])
def test_numbers_that_are_not_finite(row_layer, layout_name, value):
    _, tensors = row_layer(layout_name)
    for name in [name for name, tensor in tensors.items() if tensor.is_floating_point()]:
        layer, damaged = row_layer(layout_name)
        damaged[name][-1, -1] = value
        load(layer, damaged)
        with pytest.raises(ServingError, match=rf"^{DOWN}\.{name} is not finite everywhere; "):
            process(layer)


@pytest.mark.parametrize("name", ["row_scale", "column_scale"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_part_that_is_not_finite_is_named(attention, name, part):
    layer, tensors = attention()
    tensors[part][name][0, 0] = float("nan")
    for shard in "qkv":
        load(layer, tensors[shard], shard)
    with pytest.raises(ServingError, match=rf"^attn\.{part}_proj\.{name} is not finite"):
        process(layer)


@pytest.mark.parametrize("layout_name", ["row", "sign", "min-max"])
def test_positions_out_of_range(row_layer, layout_name, additional):
    layer, tensors = row_layer(layout_name, additional_config=additional)
    tensors["salient"][-1] = 255
    load(layer, tensors)
    with pytest.raises(FormatError, match=rf"^{DOWN}: 'salient' names a weight outside"):
        process(layer)


@pytest.mark.parametrize("layout_name", ["row", "sign", "min-max", "plain"])
def test_dummy_weights_compute(row_layer, layout_name, additional):
    layer, tensors = row_layer(
        layout_name, additional_config=additional, load_config=LoadConfig(load_format="dummy")
    )
    for name in tensors:
        param = getattr(layer, name).data
        param.fill_(
            {"salient": 255, "scales": 100, "zeros": 255}.get(
                name, 1 if param.dtype.is_floating_point else 7
            )
        )
    process(layer)
    assert not getattr(layer, "zeros", torch.zeros(1)).any()  # 255 is no zero point of few bits
    y, _ = layer(torch.ones(2, 160))
    assert y.isfinite().all()
    assert (y != 0).any()


def test_weights_loaded_into_a_dummy_engine_are_checked_again(row_layer):
    layer, tensors = row_layer(load_config=LoadConfig(load_format="dummy"))
    load(layer, tensors, skip=["scales"])
    with pytest.raises(ServingError, match=r"down_proj\.scales was not in the checkpoint"):
        process(layer)


def test_kept_layers_are_guarded_too(tiny, rank):
    config = PrecalibConfig(CheckpointConfig("test", tiny.LAYOUTS, {DOWN: "row"}))
    with rank():
        router = ReplicatedLinear(160, 8, bias=False, quant_config=config, prefix="mlp.gate")
        mlp = MergedColumnParallelLinear(
            160, [32, 32], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )
    with pytest.raises(ServingError, match=r"^mlp\.gate\.weight was not in the checkpoint, or"):
        process(router)
    load(router, {"weight": torch.ones(8, 160)})
    process(router)
    load(mlp, {"weight": torch.ones(32, 160)}, 0)
    with pytest.raises(ServingError, match=r"^mlp\.gate_up_proj\.weight was not in .* in part"):
        process(mlp)
    load(mlp, {"weight": torch.ones(32, 160)}, 1)
    process(mlp)


def test_a_part_vllm_made_up_is_refused(attention):
    layer, tensors = attention()
    param = layer.qweight
    with pytest.raises(ServingError, match=r"cannot place the part 'index_q' of this layer"):
        param.weight_loader(param, tensors["q"]["qweight"], "index_q")
