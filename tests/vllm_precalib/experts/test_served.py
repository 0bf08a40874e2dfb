"""vLLM engines on packed mixtures, against transformers or vLLM on the unpacked model."""

import functools

import engine_answers
import pytest
import torch

pytestmark = pytest.mark.engine

# Both sides compute in float32; what differs is the order of additions. Observed: 3e-6.
assert_same = functools.partial(engine_answers.assert_same, tolerance=1e-4)


@pytest.mark.parametrize(
    ("family", "weights"), [("mixtral", "first"), ("mixtral", "reloaded"), ("gpt_oss", "first")]
)
def test_answers_are_those_of_transformers(case, family, weights):
    assert_same(case("experts", family)[weights])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_both_matrices_of_every_layer_get_a_backend(case, family):
    layers = [choice["layer"] for choice in case("experts", family)["choices"]]
    inner = "block_sparse_moe" if family == "mixtral" else "mlp"
    expected = [f"model.layers.{i}.{inner}.experts.{w}" for i in range(2) for w in ("w13", "w2")]
    assert [layer for layer in layers if ".experts." in layer] == expected


def test_adapters_are_refused_in_a_sentence(case):
    text = case("experts", "lora")["text"]
    assert text.startswith("ServingError: model.layers.0.block_sparse_moe.experts: vLLM adds LoRA")
    assert "\n" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mixtral_dense",
        "mixtral_reference",
        "gpt_oss_dense",
        "llama4",
        "granitemoe",
        "qwen2_moe",
        "qwen3_moe",
    ],
)
def test_families_and_backends(case, name):
    assert_same(case("experts_families", name)["first"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_dense_experts_are_those_of_vllm(case, name):
    assert_same(case("experts_families", name)["first"], tolerance=0)


@pytest.mark.slow
def test_vllm_quantizes_experts_that_were_kept(case):
    """Its kernel for int8 experts on CPUs needs AMX."""
    result = case("experts_families", "online")
    if not torch.cpu._is_amx_tile_supported():
        assert result["refused"].startswith("No Int8 MoE backend supports the deployment")
        return
    pairs = zip(result["plain"], result["online"], strict=True)
    errors = [abs(plain[0][1] - online[0][1]) for plain, online in pairs]  # of the likeliest token
    assert 0 < max(errors) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["first", "reloaded"])
def test_packing_while_loading_is_packing_before(case, weights):
    assert_same(case("experts_families", "packed_at_load")[weights], tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_tensors_of_all_experts_are_packed_while_they_are_loaded(case, family):
    result = case("experts_families", f"{family}_packed_at_load")
    assert sum(".experts." in choice["layer"] for choice in result["choices"]) == 4
    assert_same(result["first"], tolerance=0)


def test_torch_compile_calls_the_operator(case):
    result = case("experts_compiled", "compiled")
    assert result["mode"] == "DYNAMO_TRACE_ONCE"
    assert_same(result["first"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor_parallel", "expert_parallel"])
def test_two_ranks_answer_like_one(case, name):
    assert_same(case("experts_parallel", name)["first"])
