"""`precalib tune`: what it changes, what it leaves, what it refuses."""

import json
import shutil

import pytest
import torch
import transformers
from several_files import split_weight_file

from offline_quantize import quantize_checkpoint, verify_checkpoint
from offline_quantize.calibration import own_text_tuning
from offline_quantize.calibration.scale_tuning import Factors
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.run import Run
from offline_quantize.commands.tune import tune
from precalib_kernels.errors import FormatError, OutputError, SourceError, UsageError

MODULE = "model.layers.0.mlp.down_proj"


def tune_checkpoint(directory, target, against, tokens):
    return tune(directory, target, against, NullProgress(), tokens)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Little text, as the model is tiny."""
    monkeypatch.setattr(own_text_tuning, "WINDOW", 32)
    monkeypatch.setattr(own_text_tuning, "STEP", 128)
    monkeypatch.setattr(own_text_tuning, "HELD_OUT", 512)


@pytest.fixture(scope="module")
def source(byte_llama):
    return byte_llama(hidden_size=128, intermediate_size=160)


@pytest.fixture
def pack(source, tmp_path):
    def make(recipe="balanced-2", **options):
        target = tmp_path / f"packed-{recipe}"
        quantize_checkpoint(source, target, recipe, activations="none", **options)
        return target

    return make


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("recipe", ["balanced-2", "balanced-4", "paper-3", "rtn-3"])
def test_scales_change_codes_stay_and_the_divergence_falls(source, pack, tmp_path, recipe):
    packed, tuned = pack(recipe), tmp_path / "tuned"
    done = tune_checkpoint(packed, tuned, source, tokens=1024)
    assert done.after < done.before
    assert verify_checkpoint(tuned, against=source) == []
    before, after = open_packed(packed), open_packed(tuned)
    assert (tuned / "config.json").read_bytes() == (packed / "config.json").read_bytes()
    assert after.locations.keys() == before.locations.keys()
    for module in before.config.modules:
        there, here = before.tensors(module), after.tensors(module)
        for name in there:
            scales = there[name].dtype == torch.float16
            assert torch.equal(there[name], here[name]) != scales, (module, name)
            assert torch.allclose(there[name].float(), here[name].float(), rtol=0.1, atol=1e-6)
    others = [n for n in before.locations if n.rpartition(".")[0] not in before.config.modules]
    assert "model.norm.weight" in others
    for name in others:
        assert torch.equal(before.locations[name].read(), after.locations[name].read())


def test_the_manifest_and_the_card_say_so(source, pack, tmp_path):
    packed, tuned = pack(), tmp_path / "tuned"
    tune_checkpoint(packed, tuned, source, tokens=1024)
    before, after = read_manifest(packed), read_manifest(tuned)
    assert after.run.tuned == {"tokens": 1024}
    assert after.run.model_copy(update={"tuned": None}) == before.run
    error = after.tensors[MODULE].relative_error
    assert error == pytest.approx(before.tensors[MODULE].relative_error, rel=0.2)
    assert error != before.tensors[MODULE].relative_error
    assert "scales tuned on 1,024 tokens that the model wrote" in (tuned / "README.md").read_text()


def test_equal_calls_write_equal_bytes(source, pack, tmp_path):
    packed = pack()
    for name in ("one", "two"):
        tune_checkpoint(packed, tmp_path / name, source, tokens=1024)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_card_of_somebody_else_is_copied(source, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(source, root)
    (root / "README.md").write_text("mine")
    quantize_checkpoint(root, tmp_path / "packed", activations="none", card=False)
    tune_checkpoint(tmp_path / "packed", tmp_path / "tuned", root, tokens=1024)
    assert (tmp_path / "tuned" / "README.md").read_text() == "mine"
    assert verify_checkpoint(tmp_path / "tuned", against=root) == []


def test_nothing_is_written_if_it_does_not_help(source, pack, tmp_path, monkeypatch):
    def harm(_, quantized, modules, *_more, **_options):
        weights = [quantized.get_submodule(name).weight for name in modules]
        found = (Factors(torch.full((len(w),), 3.0), torch.ones(w.shape[1])) for w in weights)
        return dict(zip(modules, found, strict=True))

    monkeypatch.setattr(own_text_tuning, "tune_factors", harm)
    with pytest.raises(UsageError, match=r"do not help on held-out text .* nothing was written"):
        tune_checkpoint(pack(), tmp_path / "tuned", source, tokens=512)
    assert not (tmp_path / "tuned").exists()


def test_what_is_refused_before_any_work(source, pack, tmp_path, monkeypatch):
    packed, target = pack(), tmp_path / "tuned"

    def refused(error, text, directory=packed, against=source, tokens=1024):
        with pytest.raises(error, match=text):
            tune_checkpoint(directory, target, against, tokens=tokens)
        assert not target.exists()

    refused(UsageError, "--tokens 100: give at least 128", tokens=100)
    refused(SourceError, "already quantized", against=packed)
    refused(SourceError, "not a packed checkpoint", directory=source)
    monkeypatch.setattr(own_text_tuning, "free_memory", lambda _: 1000)
    refused(UsageError, "takes the memory of two models")
    monkeypatch.undo()
    manifest = json.loads((packed / "precalib.json").read_text())
    for change, text in (
        ({"tuned": {"tokens": 5}}, "its scales were tuned before"),
        ({"transform": "value-output"}, "was made with --transform"),
    ):
        changed = manifest | {"job": manifest["job"] | change}
        (packed / "precalib.json").write_text(json.dumps(changed))
        refused(UsageError, text)
    (packed / "precalib.json").write_text(json.dumps(manifest))
    with (packed / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")
    refused(FormatError, "its sha256 is not the recorded one; .*nothing was written")


def test_another_source_is_refused(byte_llama, pack, tmp_path):
    other = byte_llama(hidden_size=128, intermediate_size=192)
    with pytest.raises(SourceError, match=r"has no tensor 'model\.layers.* of shape \[128, 160\]"):
        tune_checkpoint(pack(), tmp_path / "tuned", other, tokens=1024)
    assert not (tmp_path / "tuned").exists()


def test_another_model_of_the_same_shapes_is_refused(byte_llama, pack, tmp_path):
    other = byte_llama(seed=1, hidden_size=128, intermediate_size=160)
    with pytest.raises(SourceError, match=r"tensor 'model\.layers.*' is not the one that"):
        tune_checkpoint(pack(), tmp_path / "tuned", other, tokens=1024)
    assert not (tmp_path / "tuned").exists()


def test_a_target_that_holds_something_is_left_alone(source, pack, tmp_path):
    target = tmp_path / "tuned"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(OutputError, match="is not empty"):
        tune_checkpoint(pack(), target, source, tokens=1024)
    with pytest.raises(OutputError, match="lies in the source"):
        tune_checkpoint(pack("rtn-3"), source / "tuned", source, tokens=1024)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_fails_while_writing_leaves_nothing(source, pack, tmp_path, monkeypatch, error):
    packed, target = pack(), tmp_path / "tuned"

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", fail)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            tune_checkpoint(packed, target, source, tokens=1024)
    assert not target.exists()


def test_a_killed_run_is_begun_anew(source, pack, tmp_path, monkeypatch):
    packed, target = pack(), tmp_path / "tuned"
    tune_checkpoint(packed, tmp_path / "whole", source, tokens=1024)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", killed)
        patch.setattr(Run, "discard", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            tune_checkpoint(packed, target, source, tokens=1024)
    assert (target / "precalib.job.json").exists()
    with pytest.raises(OutputError, match="another 'tuned: tokens'"):
        tune_checkpoint(packed, target, source, tokens=512)
    tune_checkpoint(packed, target, source, tokens=1024)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_model_that_cannot_be_run(source, pack, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("has no attribute 'past_key_values'")

    monkeypatch.setattr(own_text_tuning, "generate_text", fail)
    with pytest.raises(SourceError, match=r"the model cannot be run .*; it cannot be tuned"):
        tune_checkpoint(pack(), tmp_path / "tuned", source, tokens=1024)
    assert not (tmp_path / "tuned").exists()


def test_files_that_came_later_are_not_taken_along(source, pack, tmp_path):
    packed = pack()
    (packed / "eval.json").write_text("{}")
    tune_checkpoint(packed, tmp_path / "tuned", source, tokens=1024)
    assert not (tmp_path / "tuned" / "eval.json").exists()
    assert verify_checkpoint(tmp_path / "tuned", against=source) == []


def test_packed_embeddings_and_several_files(byte_llama, tmp_path):
    """Embeddings that the head shares stay as they are; an index goes along."""
    root = byte_llama(hidden_size=128, intermediate_size=160, tie_word_embeddings=True)
    split_weight_file(root, 2)
    packed, tuned = tmp_path / "packed", tmp_path / "tuned"
    quantize_checkpoint(root, packed, "balanced-2", embeddings="balanced-5", activations="none")
    tune_checkpoint(packed, tuned, root, tokens=1024)
    assert verify_checkpoint(tuned, against=root) == []
    before, after = open_packed(packed), open_packed(tuned)
    for name, tensor in before.tensors("model.embed_tokens").items():
        assert torch.equal(tensor, after.tensors("model.embed_tokens")[name])
    assert {p.name for p in tuned.iterdir()} == {p.name for p in packed.iterdir()}


def test_experts_stay_and_the_rest_is_tuned(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=260, hidden_size=128, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, bos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).half()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    root, packed, tuned = (tmp_path / name for name in ("model", "packed", "tuned"))
    model.save_pretrained(root)
    quantize_checkpoint(root, packed, "balanced-2", activations="none")
    tune_checkpoint(packed, tuned, root, tokens=1024)
    assert verify_checkpoint(tuned, against=root) == []
    before, after = open_packed(packed), open_packed(tuned)
    changed = {
        module
        for module in before.config.modules
        if not torch.equal(before.weight(module), after.weight(module))
    }
    assert changed == {module for module in before.config.modules if "self_attn" in module}


def test_a_model_that_cannot_begin_a_text(source, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(source, root)
    (root / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    quantize_checkpoint(root, tmp_path / "packed", activations="none")
    with pytest.raises(UsageError, match="neither bos_token_id nor eos_token_id"):
        tune_checkpoint(tmp_path / "packed", tmp_path / "tuned", root, tokens=512)
    assert not (tmp_path / "tuned").exists()


def test_windows_fit_short_models(byte_llama, tmp_path):
    root = byte_llama(hidden_size=128, intermediate_size=160, max_position_embeddings=16)
    quantize_checkpoint(root, tmp_path / "packed", "balanced-2", activations="none")
    tune_checkpoint(tmp_path / "packed", tmp_path / "tuned", root, tokens=512)
    assert verify_checkpoint(tmp_path / "tuned", against=root) == []


def test_the_command_says_what_was_gained(source, pack, tmp_path, precalib):
    ran = precalib("tune", pack(), tmp_path / "tuned", "--against", source, "--tokens", "1024")
    assert ran.code == 0
    assert "KL to the original on text held out" in ran.out
    assert "% less" in ran.out
