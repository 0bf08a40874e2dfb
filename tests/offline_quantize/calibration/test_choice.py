"""Whether a pass is made, as it follows from the checkpoint and from what the user wrote."""

import contextlib
import json

import pytest
from safetensors.torch import load_file, save_file

from offline_quantize.calibration.choice import choose_activations, why_not
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.models import load_tokenizer
from offline_quantize.planning.activation_options import ActivationOptions
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import InputError, SourceError, UsageError

TARGETS = (3.6, 3.7, 3.8, 3.9, 4.0, 4.1, 4.2)


@pytest.fixture(scope="module")
def source(byte_llama):
    return byte_llama(hidden_size=128, intermediate_size=160)


def plan(source, recipe="balanced-4"):
    return make_plan(open_checkpoint(source), Options(recipe))


def test_auto_is_a_pass_over_random_tokens_where_it_can_be(source):
    chosen, reason = choose_activations(plan(source), "auto", None, False)
    assert chosen.options.activations == ActivationOptions("random", 1024)
    assert reason is None
    chosen, reason = choose_activations(plan(source), "auto", None, True)
    assert chosen.options.activations == ActivationOptions("self", 4096, True)
    assert reason is None


def test_a_mix_of_widths_goes_by_what_will_be_known(byte_llama):
    """Known inputs make keys and values count less, so that other weights get the wider codes."""
    root = byte_llama(hidden_size=256, intermediate_size=256, num_key_value_heads=1)

    def size_of_keys(target, text):
        mixed = make_plan(open_checkpoint(root), Options(target_bits=target))
        chosen, _ = choose_activations(mixed, text, None, False)
        return chosen.weight_plans["model.layers.0.self_attn.k_proj.weight"].stored_bytes

    sizes = [[size_of_keys(bits, text) for text in ("random", "none")] for bits in TARGETS]
    assert all(known <= unknown for known, unknown in sizes)
    assert any(known < unknown for known, unknown in sizes)


def test_auto_is_nothing_for_recipes_that_gain_nothing(source):
    chosen, reason = choose_activations(plan(source, "rtn-4"), "auto", None, False)
    assert chosen.options.activations is None
    assert reason is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "newest"}, "transformers cannot load it"),
        ({"attn_implementation": "someone/kernel"}, "asks for code of the hub"),
        ({"hidden_size": 64, "head_dim": 64}, "no linear layer of the name and shape of"),
        ({"num_hidden_layers": 1}, None),  # layers past the last are not quantized
        ({"attention_bias": True}, "wants a tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_models_that_cannot_be_run(byte_llama, change, said):
    root = byte_llama(hidden_size=128, intermediate_size=160)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | change))
    found = plan(root)
    reason = why_not(found)
    if said is None:
        assert reason is None
        return
    assert said in reason
    chosen, shown = choose_activations(found, "auto", None, False)
    assert chosen.options.activations is None
    assert shown == reason
    with pytest.raises(UsageError, match=r"^--feedback: "):
        choose_activations(found, "auto", None, True)


def test_what_the_user_wrote(source, tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("text")
    for text, tokens, feedback, expected in (
        ("self", None, False, ActivationOptions("self", 1024)),
        ("self", None, True, ActivationOptions("self", 4096, True)),
        ("random", 77, False, ActivationOptions("random", 77)),
        (str(file), 5, True, ActivationOptions(str(file), 5, True)),
    ):
        chosen, _ = choose_activations(plan(source), text, tokens, feedback)
        assert chosen.options.activations == expected
    chosen, _ = choose_activations(plan(source), "none", None, False)
    assert chosen.options.activations is None
    with pytest.raises(UsageError, match="add --activations self"):
        choose_activations(plan(source), "none", None, True)
    with pytest.raises(UsageError, match="--activation-tokens 1: give at least 2"):
        choose_activations(plan(source), "self", 1, False)


def test_a_run_is_known_by_its_text(source, tmp_path):
    """What the fingerprint of a run has of it: name and contents of a file, not its folder."""
    one, other = tmp_path / "a" / "my.txt", tmp_path / "b" / "my.txt"
    for file in (one, other):
        file.parent.mkdir()
        file.write_text("text")

    def record(file):
        chosen, _ = choose_activations(plan(source), str(file), None, False)
        return chosen.fingerprint("cpu")["activations"]

    assert record(one) == record(other)
    other.write_text("another text")
    assert record(one) != record(other)
    assert (record(one)["text"], record(one)["file"]) == ("file", "my.txt")
    with pytest.raises(InputError, match=r"none\.txt: cannot be read .* one of none, random, self"):
        record(tmp_path / "none.txt")
    assert plan(source).fingerprint("cpu")["activations"] is None


def test_a_checkpoint_without_a_head_is_no_model_to_run(byte_llama):
    """As embedding models are stored: names without "model.", no head that is tied to nothing."""
    root = byte_llama(hidden_size=128, intermediate_size=160)
    tensors = load_file(root / "model.safetensors")
    del tensors["lm_head.weight"]
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, root / "model.safetensors", metadata={"format": "pt"})
    assert why_not(plan(root)).endswith("transformers wants a tensor 'lm_head.weight'")


def test_code_of_a_checkpoint_is_never_run(byte_llama, monkeypatch):
    root = byte_llama(hidden_size=128, intermediate_size=160)
    (root / "evil.py").write_text("raise SystemExit('foreign code ran')")
    config = json.loads((root / "config.json").read_text())
    config |= {"model_type": "clip", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (root / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    code = "the model needs code that comes with the checkpoint (evil.Model), which precalib never"
    assert code in why_not(plan(root))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}
    (root / "config.json").write_text(json.dumps(config))
    assert code.replace("evil.Model", "evil.C") in why_not(plan(root))
    tokenizer = json.loads((root / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (root / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with contextlib.suppress(SourceError):
        load_tokenizer(root)
