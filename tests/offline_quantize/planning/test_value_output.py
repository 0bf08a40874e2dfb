"""Pairs are found where the transform changes nothing, which models of each kind show."""

import json

import pytest
import torch
from tiny_models import GROUPED_QUERY_CONFIG

from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.method.value_output import (
    transform_bias,
    transform_output,
    transform_value,
)
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.value_output import LINEAR_MODELS
from precalib_kernels.errors import RecipeError

ATTENTION = "model.layers.0.self_attn"


def plan(source, transform="value-output", **options):
    return make_plan(open_checkpoint(source), Options("rtn-4", transform=transform, **options))


@pytest.fixture
def source(checkpoint):
    def write(tensors=None, **changes):
        return checkpoint(tensors=tensors, config=GROUPED_QUERY_CONFIG | changes)

    return write


def test_pairs_of_every_layer(source):
    found = plan(source()).pairs
    assert [pair.attention for pair in found] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert {(pair.heads, pair.size, pair.bias) for pair in found} == {(4, 16, None)}
    assert found[0].value == f"{ATTENTION}.v_proj.weight"
    assert found[0].output == f"{ATTENTION}.o_proj.weight"


def test_a_bias_of_the_values_belongs_to_the_pair(source, weights):
    make = weights()
    tensors = make.llama() | {f"{ATTENTION}.v_proj.bias": make(64)}
    assert [pair.bias for pair in plan(source(tensors)).pairs] == [f"{ATTENTION}.v_proj.bias", None]


def test_the_file_of_matrices_is_written_first_and_in_no_index(checkpoint):
    made = plan(checkpoint(config=GROUPED_QUERY_CONFIG, shards=2))
    assert next(iter(made.files.shards)) == "precalib.transforms"
    entries = made.files.shards["precalib.transforms"].entries
    assert entries.keys() == {f"model.layers.{i}.self_attn.value_output" for i in (0, 1)}
    assert {entry.shape for entry in entries.values()} == {(4, 16, 16)}
    index = json.loads(made.files.metadata_files["model.safetensors.index.json"])
    assert "precalib.transforms" not in index["weight_map"].values()


def test_without_a_transform_nothing_tells_of_one(source):
    made = plan(source(), transform=None)
    assert not made.pairs
    assert "transform" not in made.record().to_json()
    assert "transform" not in made.fingerprint("cpu")


def test_runs_with_and_without_are_told_apart(source):
    root = source()
    assert plan(root).record().to_json()["transform"] == "value-output"
    assert plan(root).fingerprint("cpu")["transform"] == "value-output"


def test_layers_that_are_kept_are_left_out(source):
    root = source()
    pairs = plan(root, keep=["layers\\.0\\.self_attn\\.(?:o|v|k|q)_proj"]).pairs
    assert [pair.attention for pair in pairs] == ["model.layers.1.self_attn"]
    pairs = plan(root, keep=["layers\\.1\\.self_attn\\.o_proj"]).pairs
    assert [pair.attention for pair in pairs] == [ATTENTION]


def test_none_left_is_an_error(source):
    with pytest.raises(RecipeError, match="no attention module has both 'v_proj' and 'o_proj'"):
        plan(source(), keep=["o_proj"])


def test_another_transform_is_an_error(source):
    with pytest.raises(RecipeError, match="--transform hadamard: there is value-output"):
        plan(source(), "hadamard")


@pytest.mark.parametrize("kind", ["gemma3n_text", "qwen3_next", "deepseek_v3", None])
def test_unknown_models_are_refused(source, kind):
    with pytest.raises(RecipeError, match="not known to pass values unchanged"):
        plan(source(model_type=kind))


def test_clipped_values_are_refused(source):
    with pytest.raises(RecipeError, match=r"values are clipped \(clip_qkv\)"):
        plan(source(clip_qkv=8.0))


@pytest.mark.parametrize("part", ["v_norm.weight", "g_proj.weight", "kv_b_proj.weight", "sinks"])
def test_attention_with_other_parts_is_refused(source, weights, part):
    make = weights()
    shape = (64,) if part in ("v_norm.weight", "sinks") else (64, 128)
    tensors = make.llama() | {f"{ATTENTION}.{part}": make(*shape)}
    with pytest.raises(
        RecipeError, match=f"self_attn: holds '{part}', so more than a weighted sum"
    ):
        plan(source(tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 2},
        {"num_attention_heads": 16, "head_dim": 8},
        {"head_dim": None, "num_attention_heads": None},
        {"head_dim": "32"},
        {"head_dim": None, "hidden_size": 1 << 400},
    ],
)
def test_heads_that_do_not_fit_are_refused(source, change):
    with pytest.raises(
        RecipeError, match=r"q \[128, 128\], v \[64, 128\] and o \[128, 128\] do not fit"
    ):
        plan(source(**change))


def test_gated_queries_are_refused(source, weights):
    """A q_proj of twice the size holds a gate of attention's output."""
    make = weights()
    tensors = make.llama() | {f"{ATTENTION}.q_proj.weight": make(256, 128)}
    with pytest.raises(RecipeError, match=r"q \[256, 128\], .* do not fit 4 KV heads of size 16"):
        plan(source(tensors))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LINEAR_MODELS))
def test_models_of_every_kind_compute_the_same(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "attention_bias": True,
        "pad_token_id": 0,
        "use_bias": True,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.randint(1, 64, (2, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = model(tokens).logits
        for layer in model.model.layers:
            attention = layer.self_attn
            matrices = torch.randn(2, 8, 8) + 3 * torch.eye(8)
            for module, change in (
                (attention.v_proj, transform_value),
                (attention.o_proj, transform_output),
            ):
                module.weight.copy_(change(module.weight, matrices))
            assert model(tokens).logits.isfinite().all()
            if attention.v_proj.bias is not None:
                attention.v_proj.bias.copy_(transform_bias(attention.v_proj.bias, matrices))
        found = model(tokens).logits
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    names = {name.rpartition("self_attn.")[2] for name, _ in model.named_parameters()}
    assert {"v_proj.weight", "o_proj.weight"} <= names
