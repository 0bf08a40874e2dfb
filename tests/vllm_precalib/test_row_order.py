"""Rows are brought into the order of vLLM's own loaders."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.models.llama4 import Llama4ForCausalLM

from precalib_kernels.format.reference import dequantize
from vllm_precalib.column_slice import ColumnSlice
from vllm_precalib.load_guard import WeightLoadGuard
from vllm_precalib.packed_module import PackedModule
from vllm_precalib.row_order import halves_apart, rotary_heads

LLAMA4 = SimpleNamespace(model_type="llama4_text", num_attention_heads=4, num_key_value_heads=2)


def vllm_order(name, weight):
    model = SimpleNamespace(config=LLAMA4)
    return Llama4ForCausalLM.permute_qk_weight_for_rotary(model, name, weight)[1]


@pytest.mark.parametrize(("part", "heads"), [("q", 4), ("k", 2)])
def test_llama4_rows_are_ordered_as_vllm_orders_weights(tiny, part, heads):
    assert rotary_heads(LLAMA4)[part] == heads
    tensors = tiny.random_packed(tiny.ROW, 32 * heads, 160)
    ours = {n: t if n == "column_scale" else halves_apart(t, heads) for n, t in tensors.items()}
    weight = dequantize(tensors, tiny.ROW, 160)
    expected = vllm_order(f"model.layers.0.self_attn.{part}_proj.weight", weight)
    assert not torch.equal(expected, weight)
    assert torch.equal(dequantize(ours, tiny.ROW, 160), expected)


def test_values_keep_their_order():
    assert rotary_heads(LLAMA4).get("v") is None
    weight = torch.randn(64, 32)
    assert torch.equal(vllm_order("model.layers.0.self_attn.v_proj.weight", weight), weight)


@pytest.mark.parametrize("config", [None, SimpleNamespace(model_type="llama")])
def test_other_models_keep_their_rows(config):
    assert rotary_heads(config) == {}


def test_the_guard_orders_what_it_loads(tiny):
    module = PackedModule(tiny.ROW, "row", ("q_proj", "k_proj", "v_proj"))
    guard = WeightLoadGuard(
        "qkv_proj",
        module,
        ColumnSlice.of_rank(module.layout, 160, 160, 0),
        256,
        [128, 64, 64],
        {"q": 4, "k": 2},
    )
    loaded = {}

    def loader(_param, tensor, shard):
        loaded[shard] = tensor

    tensors = {
        part: tiny.random_packed(tiny.ROW, n, 160)["qweight"]
        for part, n in {"q": 128, "k": 64, "v": 64}.items()
    }
    layer = torch.nn.Identity()
    for part, tensor in tensors.items():
        guard.watch("qweight", layer, loader)(torch.empty(0), tensor, part)
    assert torch.equal(loaded["q"], halves_apart(tensors["q"], 4))
    assert torch.equal(loaded["k"], halves_apart(tensors["k"], 2))
    assert loaded["v"] is tensors["v"]
