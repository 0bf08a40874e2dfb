import json

import pytest
import torch

from offline_quantize.checkpoint.source import index_of, open_checkpoint
from offline_quantize.method.recipes import RECIPES
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import checkpoint_config, make_plan
from precalib_kernels.errors import RecipeError, SourceError
from precalib_kernels.format.checkpoint_config import CheckpointConfig

LINEARS = 7  # in each of the two layers


def plan(root, recipe="rtn-4", overrides=(), keep=(), **changes):
    return make_plan(open_checkpoint(root), Options(recipe, changes, overrides, keep))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits(checkpoint, recipe):
    made = plan(checkpoint(), recipe)
    assert len(made.weight_plans) == 2 * LINEARS
    assert made.unquantized["model.embed_tokens.weight"] == "embedding"
    assert made.unquantized["lm_head.weight"] == "output head"
    assert made.unquantized["model.layers.1.self_attn.q_proj.bias"] == "not a linear weight"
    layout = RECIPES[recipe].layout
    assert {weight.recipe.layout for weight in made.weight_plans.values()} == {layout}
    assert made.weights == sum(weight.entry.weights for weight in made.weight_plans.values())


def test_the_configuration_comes_back(checkpoint):
    made = plan(checkpoint(), overrides=[("mlp", "rtn-3")], keep=[r"layers\.1\.self_attn"])
    written = json.loads(made.files.metadata_files["config.json"])
    assert (
        written.pop("quantization_config")
        == checkpoint_config(
            made.options, made.weight_plans, made.unquantized, made.tied, {}
        ).to_dict()
    )
    assert written == {"model_type": "llama", "num_hidden_layers": 2}
    config = CheckpointConfig.from_dict(
        json.loads(made.files.metadata_files["config.json"])["quantization_config"]
    )
    assert config.modules["model.layers.0.mlp.up_proj"] == "rtn-3"
    assert config.modules["model.layers.0.self_attn.q_proj"] == "rtn-4"
    assert "model.layers.1.self_attn.q_proj" not in config.modules
    assert set(config.kept) >= {"lm_head", "model.layers.1.self_attn.q_proj"}


def test_shards_stay_shards_and_the_index_names_every_tensor(checkpoint):
    made = plan(checkpoint(shards=3))
    index = json.loads(made.files.metadata_files["model.safetensors.index.json"])
    assert index["metadata"]["by"] == "test"
    entries = {n: (f, e) for f, s in made.files.shards.items() for n, e in s.entries.items()}
    assert index["weight_map"] == {name: file for name, (file, _) in entries.items()}
    assert index["metadata"]["total_size"] == sum(e.nbytes for _, e in entries.values())
    files = {name: entry for name, entry in entries.items() if "0.self_attn.k_proj" in name}
    assert len({file for file, _ in files.values()}) == 1
    assert list(made.files.metadata_files)[-1] == "config.json"


@pytest.mark.parametrize("metadata", [None, [], "text"])
def test_an_index_with_odd_metadata(metadata):
    assert index_of({}, {"metadata": metadata})["metadata"] == {"total_size": 0}


def test_the_first_override_that_matches_wins(checkpoint):
    made = plan(checkpoint(), overrides=[("down", "balanced-4"), ("mlp", "rtn-3")])
    assert made.weight_plans["model.layers.0.mlp.down_proj.weight"].label == "balanced-4"
    assert made.weight_plans["model.layers.0.mlp.up_proj.weight"].label == "rtn-3"
    assert made.weight_plans["model.layers.0.self_attn.o_proj.weight"].label == "rtn-4"


def test_options_adjust_the_main_recipe_and_are_in_its_name(checkpoint):
    made = plan(checkpoint(), bits=3, group_size=64, overrides=[("down", "rtn-4")])
    labels = {weight.label: weight.recipe.layout for weight in made.weight_plans.values()}
    main = labels["rtn-4 --bits 3 --group-size 64"]
    assert (main.bits, main.group_size) == (3, 64)
    assert labels["rtn-4"] == RECIPES["rtn-4"].layout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recipe": "awq"}, r"^unknown recipe 'awq'; there are .*balanced-4"),
        ({"overrides": [("mlp", "awq")]}, r"^unknown recipe 'awq'; there are"),
        ({"overrides": [("(", "rtn-4")]}, r"^--override '\(' is not a regular expression"),
        ({"keep": ["["]}, r"^--keep '\[' is not a regular expression"),
        ({"overrides": [("ffn", "rtn-3")]}, r"^--override 'ffn' matches no module .*--dry-run"),
        ({"overrides": [("lm_head", "rtn-3")]}, r"^--override 'lm_head' matches no module"),
        (
            {"overrides": [("mlp", "rtn-3"), ("down_proj", "rtn-4")]},
            r"^--override 'down_proj' matches no module .* no earlier --override takes",
        ),
        ({"keep": ["ffn"]}, r"^--keep 'ffn' matches no module; "),
        ({"group_size": 48}, r"--group-size \d+: give a positive multiple of 32"),
        ({"group_size": 0}, r"--group-size \d+: give a positive multiple of 32"),
        ({"bits": 6}, r"^--bits 6: give 2, 3, 4 or 5"),
        ({"recipe": "paper-4", "salient_bits": 9}, r"--salient-bits 9: give 4 to 8"),
        (
            {"recipe": "balanced-4", "alpha": 0.5},
            r"makes 64 in a group of 128, and a group has",
        ),
        ({"recipe": "balanced-4", "alpha": -0.5}, r"."),
        ({"alpha": float("nan")}, r"^--alpha nan: give a finite number"),
        ({"alpha": float("inf")}, r"^--alpha inf: give a finite number"),
        ({"clip": 0.0}, r"^--clip 0\.0: give a share above 0"),
        (
            {"group_size": 256},
            r"source/model\.safetensors: no weight can be quantized: tensor 'model\.layers\.0\..*"
            r": its 1\d\d inputs are fewer than a group of 256; use --group-size 1\d\d or smaller$",
        ),
        (
            {"overrides": [("q_proj", "rtn-3")]},
            r"^vLLM computes these as one layer, .*: model\.layers\.0\.self_attn\.q_proj \(rtn-3\),"
            r" model\.layers\.0\.self_attn\.k_proj \(rtn-4\)",
        ),
        ({"keep": ["up_proj"]}, r"gate_proj \(rtn-4\), .*up_proj \(kept\)$"),
    ],
)
def test_options_that_do_not_fit(checkpoint, options, text):
    with pytest.raises(RecipeError, match=text):
        plan(checkpoint(), **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.float64])
def test_weights_of_other_types_are_refused_but_may_be_kept(checkpoint, weights, dtype):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = weights().llama()
    tensors[name] = torch.zeros(128, 160).to(dtype)
    tensors["model.embed_tokens.weight"] = torch.zeros(8, 128).to(torch.float8_e4m3fn)
    root = checkpoint(tensors=tensors)
    with pytest.raises(SourceError, match=rf"safetensors: tensor '{name}' has type .*use --keep"):
        plan(root)
    assert plan(root, keep=[r"layers\.1\.mlp\.down_proj"]).unquantized[name] == "--keep"


def test_nothing_to_quantize(checkpoint, weights):
    for number, tensors in enumerate(({}, {"model.embed_tokens.weight": weights()(8, 64)})):
        root = checkpoint(str(number), tensors)
        with pytest.raises(SourceError, match=rf"{root}: no tensor looks like a linear weight"):
            plan(root)
    with pytest.raises(SourceError, match="nothing to quantize"):
        plan(checkpoint(), keep=["."])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_name_that_packing_would_take_twice(checkpoint, weights, shards):
    tensors = weights().llama() | {"model.layers.0.mlp.up_proj.scales": weights()(3)}
    root = checkpoint(tensors=tensors, shards=shards)
    text = r"packing 'model\.layers\.0\.mlp\.up_proj\.weight' would make a second tensor '.*scales'"
    with pytest.raises(SourceError, match=text):
        plan(root)
    plan(root, keep=[r"layers\.0\.mlp\.(up|gate)_proj$"])


def test_tensors_that_need_no_attention(checkpoint, weights):
    """Tied embeddings, extra layers, a vision tower, odd types and shapes are all carried over."""
    make = weights()
    extra = {
        "mtp.layers.0.mlp.up_proj.weight": make(64, 128),
        "model.layers.2.mlp.up_proj.weight": make(64, 128),
        "visual.blocks.0.attn.qkv.weight": make(64, 128),
        "model.layers.0.mlp.gate.weight": make(4, 128),
        "model.layers.0.conv1d.weight": make(4, 1, 3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": make(16).float(),
        "model.layers.0.mlp.small.weight": make(4, 100),
        "model.layers.0.mlp.none.weight": make(0, 128),
        "scalar": torch.tensor(1.5),
        "mask": torch.zeros(3, 3, dtype=torch.bool),
        "fp8": torch.zeros(5, dtype=torch.float8_e5m2),
    }
    tensors = make.llama() | extra
    del tensors["lm_head.weight"]
    made = plan(checkpoint(tensors=tensors))
    assert extra.keys() <= made.unquantized.keys()
    assert len(made.weight_plans) == 2 * LINEARS


def test_the_fingerprint_names_what_matters(checkpoint):
    root = checkpoint()
    fingerprint = plan(root).fingerprint("cpu")
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    for other in (plan(root, "rtn-3"), plan(root, alpha=0.0), plan(root, keep=["o_proj"])):
        assert other.fingerprint("cpu") != fingerprint
    assert plan(root).fingerprint("cpu") == fingerprint


def test_a_weight_narrower_than_a_group_is_kept_with_all_that_is_fused_with_it(checkpoint, weights):
    tensors = weights().llama()
    for name in ("self_attn.q_proj", "mamba.dt_proj"):
        tensors[f"model.layers.0.{name}.weight"] = weights()(64, 32)
    made = plan(checkpoint(tensors=tensors))
    reason = "its 32 inputs are fewer than a group of 128"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mamba.dt_proj"):
        assert made.unquantized[f"model.layers.0.{name}.weight"] == reason
    assert "model.layers.1.self_attn.q_proj.weight" in made.weight_plans
    fine = plan(checkpoint("fine", tensors), overrides=[("dt_proj", "rtn-3")], group_size=32)
    assert len(fine.weight_plans) == 2 * LINEARS


def test_parts_that_any_model_of_vllm_fuses_need_one_layout(checkpoint, weights):
    tensors = weights().llama()
    for part in ("in_proj_b", "in_proj_a"):
        tensors[f"model.layers.0.linear_attn.{part}.weight"] = weights()(16, 128)
    root = checkpoint(tensors=tensors)
    with pytest.raises(RecipeError, match=r"in_proj_b \(rtn-3\), .*in_proj_a \(rtn-4\)$"):
        plan(root, overrides=[("in_proj_b", "rtn-3")])
    made = make_plan(open_checkpoint(root), Options(target_bits=3.5))
    labels = {made.weight_plans[f"model.layers.0.linear_attn.in_proj_{x}.weight"] for x in "ab"}
    assert len({weight.label for weight in labels}) == 1


def test_weights_that_vllm_rewrites_stay_unquantized(checkpoint):
    config = {"architectures": ["K2HorizonForCausalLM"], "num_hidden_layers": 2}
    made = plan(checkpoint(config=config))
    for part in "qkv":
        reason = made.unquantized[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert reason == "vLLM folds a permutation into its rows when it loads it"
    assert "model.layers.1.self_attn.o_proj.weight" in made.weight_plans


def test_a_model_all_of_whose_weights_vllm_changes_is_refused(checkpoint):
    root = checkpoint(config={"architectures": ["JinaEmbeddingsV5Model"]})
    with pytest.raises(SourceError, match=r"JinaEmbeddingsV5Model: vLLM adds a LoRA adapter to"):
        plan(root)
