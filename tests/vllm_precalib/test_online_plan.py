"""What is quantized at load, and which options are refused."""

import pytest

from offline_quantize.method.recipes import RECIPES
from offline_quantize.planning.options import Options as RecipeOptions
from precalib_kernels.errors import ServingError
from vllm_precalib.backends import Options
from vllm_precalib.online_plan import OnlinePlan

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def plan(*configs, **options):
    return OnlinePlan(RecipeOptions(**options), *configs)


def test_the_choice_is_that_of_the_quantizer():
    chosen = plan({"num_hidden_layers": 2}, overrides=[("down_proj", "rtn-3")])
    shape = 64, 128
    module = chosen.module("model.layers.1.self_attn.qkv_proj", shape, FUSED)
    assert module.module.shards == tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
    assert module.recipe == RECIPES["balanced-4"]
    assert chosen.module("model.layers.1.mlp.down_proj", shape, {}).recipe == RECIPES["rtn-3"]
    reasons = {
        "model.layers.2.mlp.down_proj": "multi-token prediction head",
        "model.layers.1.mlp.gate": "router or gate",
        "visual.blocks.0.mlp.fc1": "vision or audio tower",
        "": "outside the decoder layers",
    }
    for prefix, reason in reasons.items():
        assert chosen.module(prefix, shape, FUSED) == reason
    narrow = chosen.module("model.layers.0.a.dt_proj", (64, 96), {})
    assert narrow == "its 96 inputs are fewer than a group of 128"
    odd = chosen.module("model.layers.0.a.dt_proj", (64, 100), {})
    assert odd == "input size 100 is not a multiple of 32"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": ["k_proj"]}, r'"keep" treats a\.layers\.0\.q_proj, .* differently, which vLLM'),
        ({"overrides": [("k_proj", "rtn-3")]}, r'"overrides" treats a\.layers\.0\.q_proj, '),
    ],
)
def test_parts_of_one_layer_are_treated_alike(options, text):
    with pytest.raises(ServingError, match=text):
        plan(**options).module("a.layers.0.qkv_proj", (64, 128), FUSED)


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        ({}, {"recipe": "none"}, r'^additional_config: "precalib": unknown recipe \'none\''),
        ({}, {"keep": ["("]}, r'^additional_config: "precalib": --keep .* not a regular expr'),
        (
            {"architectures": ["OPTForCausalLM"]},
            {"head": "rtn-4"},
            r'serves OPTForCausalLM .* "hea',
        ),
        (
            {"model_type": "opt"},
            {"embeddings": "rtn-4"},
            r"serves opt with unquantized embeddings only",
        ),
        (
            {"model_type": "llama", "tie_word_embeddings": True},
            {"embeddings": "rtn-4", "head": "rtn-3"},
            r'would be packed with them; leave out "head"',
        ),
    ],
)
def test_options_that_are_wrong(config, options, text):
    with pytest.raises(ServingError, match=text):
        plan(config, **options)


def test_patterns_that_match_nothing():
    chosen = plan(keep=["down"], overrides=[("q_proj", "rtn-3")])
    chosen.module("model.layers.0.mlp.down_proj", (64, 128), {})
    with pytest.raises(ServingError, match=r'"overrides" .q_proj. matches no module that is quan'):
        chosen.check_used()
    chosen.module("model.layers.0.self_attn.q_proj", (64, 128), {})
    chosen.check_used()
    chosen = plan(keep=["dwn"])
    chosen.module("model.layers.0.mlp.down_proj", (64, 128), {})
    text = r'^additional_config: "keep" .dwn. matches no module; .* as model\.layers\.0\.mlp\.down'
    with pytest.raises(ServingError, match=text):
        chosen.check_used()


def test_weights_that_vllm_rewrites_stay_as_they_are():
    step = plan({"architectures": ["Step3TextForCausalLM"], "num_hidden_layers": 2})
    reason = step.module("model.layers.0.self_attn.q_proj", (64, 128), {})
    assert reason == "vLLM copies its rows into another weight when it loads it"
    with pytest.raises(
        ServingError, match=r"^JinaEmbeddingsV5Model: vLLM adds a LoRA .* leave out"
    ):
        plan({"architectures": ["JinaEmbeddingsV5Model"]})


@pytest.mark.parametrize(
    "wrong", [{"recipe": 3}, {"keep": "a"}, {"keep": [1]}, {"overrides": {"a": 1}}, {"head": None}]
)
def test_options_of_another_kind_are_refused(wrong):
    with pytest.raises(
        ServingError, match=r'"precalib" is .* and for a checkpoint that is not pac'
    ):
        Options.parse({"precalib": wrong})


def test_options_are_read():
    fields = {"recipe": "rtn-3", "keep": ["a"], "overrides": {"b": "rtn-4"}, "head": "rtn-4"}
    recipes = Options.parse({"precalib": fields}).recipes
    assert recipes == RecipeOptions("rtn-3", overrides=(("b", "rtn-4"),), keep=("a",), head="rtn-4")
