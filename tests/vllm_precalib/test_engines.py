"""vLLM engines against transformers on the weights as the reference unpacks them."""

import functools

import engine_answers
import pytest
import torch

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.format.layout import Layout
from vllm_precalib.backends import plugin_registry

pytestmark = pytest.mark.engine

# Both sides compute in float32; what differs is the order of additions. Observed: 5e-6.
LOGPROB_TOLERANCE = 1e-3
assert_same = functools.partial(engine_answers.assert_same, tolerance=LOGPROB_TOLERANCE)


def default_backend():
    """Of packed layers on this machine: `x86`, or `dense` without AVX2."""
    spec = LinearSpec(Layout(bits=4, group_size=128), 128, (16,), torch.float32, "cpu")
    return plugin_registry().choose(spec).backend.name


LLAMA = ["llama", "llama_dense", "llama_reference"]
MODELS = [*LLAMA, "qwen2", "tied", "phi3", "stablelm", "llama4"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["first", "reloaded"])
def test_answers_are_those_of_transformers(case, name, weights):
    assert_same(case("eager", name)[weights])


@pytest.mark.parametrize("name", ["tied_dense", "tied_reference"])
def test_packed_embeddings_are_those_of_transformers(case, name):
    assert_same(case("eager", name)["first"])


def test_one_layer_holds_embeddings_and_head(case):
    layers = [choice["layer"] for choice in case("eager", "tied")["choices"]]
    assert sorted(layers) == sorted([*PACKED, "model.embed_tokens"])


def test_two_bits_are_served_beside_three(case):
    result = case("eager", "two_bits")
    assert {choice["backend"] for choice in result["choices"]} == {default_backend()}
    assert_same(result["first"])


PACKED = {  # how vLLM fuses what `engines_suite.llama` packs
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
} - {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("name", ["llama", "llama_dense", "llama_reference", "stablelm"])
def test_every_layer_is_computed_by_the_backend_that_is_meant(case, name):
    backend = name.partition("_")[2]
    choices = case("eager", name)["choices"]
    assert sorted(choice["layer"] for choice in choices) == sorted(PACKED)
    assert {choice["backend"] for choice in choices} == {backend or default_backend()}
    assert {choice["asked_for"] for choice in choices} == {bool(backend)}


def test_every_rank_writes_down_its_choices(case):
    choices = case("parallel", "tensor")["choices"]
    layers = sorted([*PACKED, "model.embed_tokens"])
    expected = [(rank, layer) for rank in range(2) for layer in layers]
    assert sorted((choice["rank"], choice["layer"]) for choice in choices) == expected
    assert {choice["backend"] for choice in choices} == {default_backend()}


def test_reloading_changes_the_answers(case):
    result = case("eager", "llama")
    assert result["first"][0] != result["reloaded"][0]


def test_the_method_is_found_in_config_json(case):
    assert case("eager", "llama")["quantization"] == "precalib"


def test_activations_of_8_bits_change_answers_a_little(case):
    result = case("eager", "int8_activations")
    if not result:
        pytest.skip("this processor lacks AVX-512 with VNNI and VBMI")
    pairs = zip(*result["first"], strict=True)
    errors = [abs(served[0][1] - true[0][1]) for served, true in pairs]  # of the likeliest token
    assert LOGPROB_TOLERANCE < max(errors) < 0.05


@pytest.mark.parametrize("weights", ["first", "reloaded"])
def test_quantizing_while_loading_is_quantizing_before(case, weights):
    assert_same(case("eager", "online")[weights], tolerance=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_exactly_the_unpacked_model(case, dtype):
    assert_same(case("eager", "half_precision")[dtype], tolerance=0)


def test_dummy_weights_answer_and_make_room_for_real_ones(case):
    result = case("eager", "dummy")
    assert result["tokens"] == [8, 8, 8]
    assert_same(result["reloaded"])


@pytest.mark.parametrize("name", ["lora", "lora_dense", "lora_reference"])
def test_lora_adapters_add_to_packed_layers(case, name):
    result = case("eager", name)
    for adapter in ("adapter", "nothing", "none"):
        assert_same(result[adapter])
    assert result["nothing"][0] == result["none"][0]
    assert result["adapter"][0] != result["none"][0]


def test_a_checkpoint_that_is_not_whole_is_refused(case):
    result = case("eager", "refused")
    assert result["packed"].startswith(
        "ServingError: model.layers.1.self_attn.k_proj.scales was not in the checkpoint; "
    )
    assert result["kept"].startswith(
        "ServingError: model.layers.1.mlp.down_proj.weight was not in the checkpoint, or only"
    )
    assert result["ranks"].startswith("FormatError: model.layers.0.self_attn.qkv_proj")
    assert "'salient' names a weight outside its group" in result["ranks"]


def test_checkpoints_of_earlier_releases_are_served(case):
    result = case("eager", "released")
    assert result
    for pair in result.values():
        assert_same(pair)


@pytest.mark.parametrize("name", ["compiled", "compiled_dense", "compiled_reference"])
def test_torch_compile_traces_it(case, name):
    result = case("compiled", name)
    assert result["mode"] == "DYNAMO_TRACE_ONCE"
    assert_same(result["first"])


@pytest.mark.parametrize(
    ("suite_name", "name"),
    [
        ("parallel", "tensor"),
        ("parallel_four", "four_tensor"),
        ("pipeline", "pipeline"),
        ("pipeline_four", "four_pipeline"),
    ],
)
def test_several_ranks_answer_like_one(case, suite_name, name):
    assert_same(case(suite_name, name)["first"])


def test_both_copies_of_data_parallelism_answer_like_one(case):
    first, second = case("parallel", "data")["copies"]
    assert_same(first)
    assert_same(second)


def test_vllm_serves_no_pipeline_with_enforce_eager(case, suite):
    """Of unpacked models neither; docs/serving.md tells so until this fails."""
    assert case("parallel", "eager_pipeline")["text"].startswith("EngineDeadError: ")
    assert "assert self.intermediate_tensors is not None" in suite("parallel")["log"]


def test_vllm_for_cpus_does_not_run_on_ray(case):
    """No model of any kind; docs/serving.md tells so until this fails."""
    pytest.importorskip("ray")
    text = "ValueError: current platform cpu does not support ray."
    assert case("ray", "ray") == {"packed": text, "dense": text}


@pytest.mark.parametrize(
    "name", ["eager", "compiled", "parallel", "parallel_four", "pipeline", "pipeline_four"]
)
def test_the_process_ends_well(suite, name):
    assert suite(name)["code"] == 0, suite(name)["log"][-5000:]


def test_the_backend_is_logged_once_for_all_layers_and_ranks(suite):
    log = suite("parallel")["log"].partition("=== case data")[0]  # one engine of two ranks
    for layout in ("row", "sign"):
        line = f"precalib computes layout {layout} with backend {default_backend()} ("
        assert log.count(line) == 1
