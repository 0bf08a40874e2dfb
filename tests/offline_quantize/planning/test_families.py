"""What is special about families of models."""

import pytest

from offline_quantize.planning import families
from offline_quantize.planning.families import architectures_of
from offline_quantize.planning.selection import classify, fused_siblings


def test_architectures_are_named_or_made_of_the_type():
    assert architectures_of({"architectures": ["A"]}, {"model_type": "llama"}) == {"A"}
    assert architectures_of({"model_type": "gemma3n_text"}) == {"Gemma3nForCausalLM"}
    assert architectures_of({"architectures": None, "model_type": None}, {}) == set()


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("K2HorizonForCausalLM", "model.layers.0.self_attn.k_proj"),
        ("BloomForCausalLM", "transformer.h.0.self_attention.query_key_value"),
        ("GteNewModel", "new.encoder.layer.0.mlp.up_gate_proj"),
        ("TeleChat2ForCausalLM", "transformer.h.0.self_attention.key_value"),
        ("Step3TextForCausalLM", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_rewritten_weights_are_not_quantized_in_these_models_only(architecture, module):
    reason = classify(f"{module}.weight", (64, 64), "F16", None, architectures=[architecture])
    assert reason
    assert reason.startswith("vLLM ")
    assert classify(f"{module}.weight", (64, 64), "F16", None, architectures=["Other"]) is None


def test_what_is_fused_with_a_rewritten_weight_stays_unquantized_too():
    """Else vLLM would fuse a packed part and an unquantized one."""
    for rewrite in families.REWRITES:
        architecture = min(rewrite.architectures)
        modules = ["q_proj", "k_proj", "v_proj", "query", "key_value", "up_proj", "gate_proj"]
        names = [f"model.layers.0.self_attn.{name}" for name in modules]
        for siblings in fused_siblings(names):
            kept = {families.rewritten([architecture], name) is None for name in siblings}
            assert len(kept) == 1


def test_heads_that_vllm_does_not_pack():
    assert families.unpackable_head(["Cohere2ForCausalLM"]) == "Cohere2ForCausalLM"
    assert families.unpackable_head(["OPTForCausalLM", "B"]) == "OPTForCausalLM"
    assert families.unpackable_head(["LlamaForCausalLM"]) is None


def test_overlapping_groups_are_one():
    modules = [f"a.{part}_proj" for part in "qkvg"]
    assert [set(group) for group in fused_siblings(modules)] == [set(modules)]
