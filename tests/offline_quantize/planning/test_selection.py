"""Which tensors are linear weights, by the names that real checkpoints use."""

import re
from pathlib import Path

import pytest

from offline_quantize.checkpoint.source import Checkpoint
from offline_quantize.planning.selection import classify, decoder_depth, fused_siblings

QUANTIZED = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.27.mlp.down_proj.weight",
    "model.decoder.layers.3.fc1.weight",
    "transformer.h.4.self_attention.query_key_value.weight",
    "gpt_neox.layers.5.mlp.dense_h_to_4h.weight",
    "transformer.blocks.6.ffn.up_proj.weight",
    "transformer.encoder.layers.7.self_attention.dense.weight",
    "model.layers.1.block_sparse_moe.experts.7.w2.weight",
    "model.layers.1.mlp.experts.127.gate_proj.weight",
    "model.layers.1.mlp.shared_experts.up_proj.weight",
    "model.layers.1.mlp.shared_expert.down_proj.weight",
    "model.layers.2.self_attn.q_a_proj.weight",
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.2.self_attn.kv_b_proj.weight",
    "model.layers.2.linear_attn.in_proj_qkvz.weight",
    "backbone.layers.3.mixer.in_proj.weight",
    "model.language_model.layers.4.mlp.gate_up_proj.weight",
    "language_model.model.layers.5.self_attn.o_proj.weight",
]

UNQUANTIZED = {
    "output head": ["lm_head.weight", "model.embed_out.weight", "score.weight"],
    "embedding": [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "model.layers.61.embed_tokens.weight",
        "transformer.word_embeddings.weight",
        "model.layers.0.embed_per_layer.weight",
    ],
    "norm": ["model.layers.0.norm.weight", "transformer.h.0.ln_1.weight", "model.ln_f.weight"],
    "router or gate": [
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.feed_forward.router.weight",
        "transformer.blocks.0.ffn.router.layer.weight",
        "model.layers.0.mlp.gate.wg.weight",
    ],
    "vision or audio tower": [
        "visual.blocks.0.attn.qkv.weight",
        "model.visual.blocks.0.mlp.fc1.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_model.layers.0.mlp.fc1.weight",
        "audio_tower.layers.0.fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "vpm.encoder.layers.0.self_attn.q_proj.weight",
        "speech_encoder.layers.0.fc1.weight",
        "model.sam_model.blocks.0.mlp.lin1.weight",
    ],
    "multi-token prediction head": [
        "mtp.layers.0.self_attn.q_proj.weight",
        "model.mtp_layers.0.mlp.up_proj.weight",
        "model.layers.61.self_attn.q_proj.weight",  # num_hidden_layers is 61
        "model.layers.61.eh_proj.weight",
        "model.layers.62.mlp.experts.3.up_proj.weight",
    ],
    "outside the decoder layers": ["model.proj_in.weight", "pre_projection.weight"],
    "not a linear weight": ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mixer.A_log"],
}


def reason(name, shape=(64, 64), dtype="BF16", depth=61, keep=()):
    return classify(name, shape, dtype, depth, [re.compile(text) for text in keep])


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(name):
    assert reason(name) is None


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k, names in UNQUANTIZED.items() for name in names]
)
def test_unquantized(kind, name):
    assert reason(name) == kind


@pytest.mark.parametrize("shape", [(64,), (2, 64, 64), ()])
def test_other_shapes_stay_unquantized(shape):
    assert reason("model.layers.0.mlp.experts.down_proj.weight", shape) == "not a linear weight"


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_empty_weights_stay_unquantized(shape):
    assert reason("model.layers.0.mlp.up_proj.weight", shape) == "empty"


def test_inputs_that_are_no_whole_number_of_bytes_stay_unquantized():
    text = "input size 100 is not a multiple of 32"
    assert reason("model.layers.0.mlp.up_proj.weight", (64, 100)) == text


@pytest.mark.parametrize(
    "config", [{"text_config": {"num_hidden_layers": 2}}, {"llm_config": {"num_hidden_layers": 2}}]
)
def test_the_depth_of_a_nested_language_model(config):
    source = Checkpoint(Path(), {}, {}, None, config, (), ())
    depth = decoder_depth(source.text_config, config)
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    assert reason(name.format(1), depth=depth) is None
    assert reason(name.format(2), depth=depth) == "multi-token prediction head"


def test_the_first_configuration_that_tells_the_depth_counts():
    assert decoder_depth({}, {"num_hidden_layers": 3}) == 3
    assert decoder_depth({"num_hidden_layers": 2}, {"num_hidden_layers": 3}) == 2


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": "2"}, {"num_hidden_layers": None}])
def test_an_unknown_depth(config):
    assert decoder_depth(config) is None
    assert reason("model.layers.99.mlp.up_proj.weight", depth=None) is None


def test_the_head_is_quantized_on_demand():
    assert classify("lm_head.weight", (64, 64), "F16", 2, head=True) is None
    assert classify("score.weight", (64, 64), "F16", 2, head=True) == "output head"


def test_keep_is_searched_in_the_module_name():
    name = "model.layers.0.mlp.up_proj.weight"
    assert reason(name, keep=["mlp"]) == "--keep"
    assert reason(name, keep=[r"up_proj$"]) == "--keep"
    assert reason(name, keep=["weight"]) is None


def test_fused_parts():
    modules = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.w1", "b.w2", "c.gate_proj"]
    assert list(fused_siblings(modules)) == [["a.q_proj", "a.k_proj", "a.v_proj"]]
    assert list(fused_siblings(["b.w3", "b.w1"])) == [["b.w1", "b.w3"]]
