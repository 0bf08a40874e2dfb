"""Options of vLLM change packed models as they change others."""

import re

import pytest

pytestmark = pytest.mark.engine


def assert_close(served, expected, tolerance):
    """Equal tokens, and log probabilities that differ by at most `tolerance`."""
    for steps, true_steps in zip(served, expected, strict=True):
        assert [token for token, _ in steps] == [token for token, _ in true_steps]
        for (_, logprob), (_, true_logprob) in zip(steps, true_steps, strict=True):
            assert abs(logprob - true_logprob) <= tolerance


@pytest.mark.parametrize(
    ("name", "backend"), [("scheduling", "default"), ("scheduling", "dense"), ("ngram", "default")]
)
def test_prefixes_chunks_and_ngrams_change_no_answer(case, name, backend):
    """Both computed in float32; what differs is the order of additions."""
    result = case("options", name)
    for answers in ("first", "again"):
        assert_close(result[backend][answers], result["truth"], 1e-3)
    assert result[backend]["cached"] > 0
    if name == "ngram":
        assert result[backend]["drafts"] > 0
        assert result[backend]["accepted"] > 0


@pytest.mark.parametrize("name", ["scheduling", "ngram"])
def test_structured_output_is_that_of_dense(case, name):
    expected = case("options", "scheduling")
    served, dense = case("options", name)["default"], expected["dense"]
    assert re.fullmatch(expected["pattern"], served["text"])
    assert served["text"] == dense["text"]
    assert served["logprobs"] == pytest.approx(dense["logprobs"], abs=1e-3)


def test_half_precision_is_close_to_dense(case):
    """Both round to the 11 bits of float16 in every layer, in their own places."""
    result = case("options", "float16")
    assert_close(result["default"], result["dense"], 0.02)


def test_keys_and_values_of_8_bits_are_those_of_dense(case):
    """They are rounded alike, but where a last bit decides."""
    result = case("options", "fp8_kv_cache")
    assert_close(result["default"], result["dense"], 0.02)
    assert result["default"] != result["whole"]


def test_a_draft_head_is_carried_over_and_drafts(case):
    result = case("options", "draft_head")
    assert result["packed"]
    assert not [module for module in result["packed"] if module.startswith("model.layers.2.")]
    assert result["drafts"] > 0
    assert_close(*result["first"], 1e-3)


def test_images_and_words_are_answered_as_by_transformers(case):
    """The tower and what leads from it stay unquantized."""
    result = case("options", "images")
    kept = result["unquantized"]
    assert kept["model.vision_model.encoder.layers.1.mlp.fc2.weight"] == "vision or audio tower"
    assert kept["model.connector.modality_projection.proj.weight"] == "outside the decoder layers"
    for name in ("packed", "dense", "online"):
        assert_close(result[name], result["truth"], 1e-3)
    for answer, unquantized in zip(result["packed"], result["source"], strict=True):
        assert answer != unquantized
    one, other = result["packed"][:2]  # the same words
    assert one != other


def test_streamed_weights_are_those_of_the_files(case):
    pytest.importorskip("runai_model_streamer")
    result = case("options", "streamed")
    assert result["packed runai_streamer"] == result["packed auto"]
    assert result["online runai_streamer"] == result["online auto"] != result["packed auto"]
    assert_close(result["packed auto"], result["truth"], 1e-3)


def test_what_cannot_be_is_said_in_a_sentence(case):
    result = case("options", "refused")
    assert result["sharded_state"].startswith(
        "ServingError: --load-format sharded_state brings wei"
    )
    assert "Sleep mode is not supported on current platform" in result["sleep"]
