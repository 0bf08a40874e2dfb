"""`precalib quantize --activations`: what is stored, resumed, recorded and said."""

import json
import shutil

import pytest
import torch
import transformers
from killed_runs import Disk, Killed
from safetensors.torch import load_file, save_file
from several_files import split_weight_file
from tiny_models import write_idefics3

from offline_quantize.calibration import observation
from offline_quantize.calibration.activations import input_statistics
from offline_quantize.calibration.choice import choose_activations
from offline_quantize.calibration.text import random_tokens
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.commands.quantize import quantize as run_quantize
from offline_quantize.evaluation.arithmetic import default_dtype
from offline_quantize.evaluation.models import load_original
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import UsageError


@pytest.fixture
def source(byte_llama):
    return byte_llama(hidden_size=128, intermediate_size=160, max_position_embeddings=128)


@pytest.fixture
def shards(source, tmp_path):
    """The same model in three files, whose tensors are in no order of the layers."""
    root = tmp_path / "shards"
    shutil.copytree(source, root)
    split_weight_file(root, 3)
    return root


def run(source, target, jobs=1, resume=False, text="random", feedback=False, **options):
    plan = make_plan(open_checkpoint(source), Options("balanced-4", **options))
    plan, _ = choose_activations(plan, text, 256, feedback)
    return run_quantize(plan, target, NullProgress(), jobs, "cpu", resume)


def test_column_scales_follow_the_inputs(source, tmp_path):
    """Where they are compared with those of a run without, their ratio is E[x²]^(-1/8)."""
    run(source, tmp_path / "with")
    run(source, tmp_path / "without", text="none")
    model = load_original(source, default_dtype("cpu"), "cpu")
    tokens = torch.stack(random_tokens(model, 256))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_hook(
                lambda _, inputs, __, name=name: seen.update({name: inputs[0].detach()})
            )
    with torch.inference_mode():
        model(tokens)
    ours, others = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("with", "without")
    )
    assert len(seen) == 14
    for name, x in seen.items():
        scale, plain = (t[f"{name}.column_scale"].double()[0] for t in (ours, others))
        expected = plain**0.75 * input_statistics(x, False).mean_square.double() ** (-1 / 8)
        expected /= expected.log().mean().exp()
        torch.testing.assert_close(scale, expected, rtol=3e-3, atol=0)
        assert not torch.allclose(scale, plain, rtol=0.05)


@pytest.mark.parametrize("feedback", [False, True])
def test_a_vision_language_model_is_run_without_images(tmp_path, feedback):
    """The inputs of every packed layer are known."""
    write_idefics3(tmp_path / "source", 3)
    run(tmp_path / "source", tmp_path / "with", feedback=feedback)
    run(tmp_path / "source", tmp_path / "without", text="none")
    ours, others = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("with", "without")
    )
    scales = [name for name in ours if name.endswith("column_scale")]
    assert len(scales) == 14
    assert all(not torch.equal(ours[name], others[name]) for name in scales)


@pytest.mark.parametrize("feedback", [False, True])
def test_jobs_and_files_change_no_tensor(source, shards, tmp_path, contents, feedback):
    expected = {}
    run(source, tmp_path / "one", feedback=feedback)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    run(shards, tmp_path / "three", feedback=feedback)
    run(shards, tmp_path / "jobs", jobs=3, feedback=feedback)
    assert contents(tmp_path / "three") == contents(tmp_path / "jobs")
    found = {}
    for file in (tmp_path / "three").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("feedback", [False, True])
def test_a_killed_run_is_taken_up(shards, tmp_path, contents, monkeypatch, feedback):
    run(shards, tmp_path / "whole", feedback=feedback)
    disk = Disk(monkeypatch)
    for last in (4, 19, 60):
        target = tmp_path / f"killed-{last}"
        disk.kill_at(last)
        with pytest.raises(Killed):
            run(shards, target, feedback=feedback)
        disk.live()
        run(shards, target, resume=True, feedback=feedback)
        assert contents(target) == contents(tmp_path / "whole")
    assert run(shards, tmp_path / "whole", resume=True, feedback=feedback).seconds is None


def test_the_command_says_and_records_what_it_did(source, precalib, tmp_path):
    done = precalib("quantize", source, tmp_path / "auto")
    assert done.code == 0, done.err
    assert "Inputs of layers: known from 1,024 random tokens." in done.out
    record = read_manifest(tmp_path / "auto").run.activations
    assert record == {"text": "random", "tokens": 1024, "feedback": False}
    assert precalib("verify", tmp_path / "auto", "--against", source).code == 0
    planned = precalib("quantize", source, tmp_path / "new", "--dry-run", "--activations", "self")
    assert "known from 1,024 tokens that the model wrote." in planned.out
    done = precalib("quantize", source, tmp_path / "rtn", "--recipe", "rtn-4")
    assert "Inputs of layers" not in done.out
    assert read_manifest(tmp_path / "rtn").run.activations is None
    done = precalib("quantize", source, tmp_path / "wrong", "--activations", tmp_path / "none.txt")
    assert "none.txt: cannot be read" in done.sentence
    assert not (tmp_path / "wrong").exists()


def test_a_model_that_cannot_be_run_is_quantized_without(checkpoint, precalib, tmp_path):
    source = checkpoint()  # its configuration says nothing of its sizes
    done = precalib("quantize", source, tmp_path / "auto")
    assert done.code == 0, done.err
    assert "Note: quantized without a forward pass" in done.out
    assert read_manifest(tmp_path / "auto").run.activations is None
    done = precalib("quantize", source, tmp_path / "asked", "--activations", "random")
    assert "quantize with --activations none" in done.sentence
    assert not (tmp_path / "asked").exists()


def test_a_tied_head_takes_up_errors_too(byte_llama, tmp_path):
    """Its inputs come from the model's last norm, so the error of the logits gets smaller."""
    source = byte_llama(hidden_size=128, intermediate_size=160, tie_word_embeddings=True)
    model = load_original(source, torch.float32, "cpu")
    tokens = torch.stack(random_tokens(model, 256))
    with torch.inference_mode():
        x = model.base_model(tokens).last_hidden_state.flatten(0, 1)
    weight = model.lm_head.weight.detach()
    errors = {}
    for feedback in (False, True):
        target = tmp_path / str(feedback)
        run(source, target, feedback=feedback, head="balanced-4")
        packed = open_packed(target).weight("lm_head")
        errors[feedback] = float((x @ (packed - weight).T).square().mean())
    assert errors[True] < 0.9 * errors[False]


def damaged(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("options", [[], ["--feedback"], ["--activations", "self"]])
def test_a_damaged_norm_is_told_from_damaged_weights(source, precalib, tmp_path, options):
    name = "model.layers.0.post_attention_layernorm.weight"
    damaged(source, lambda tensors: tensors[name].fill_(float("nan")))
    done = precalib("quantize", source, tmp_path / "packed", *options)
    assert "quantize with --activations none" in done.sentence
    assert "row_scale" not in done.sentence
    assert not (tmp_path / "packed").exists()
    assert precalib("quantize", source, tmp_path / "none", "--activations", "none").code == 0


def test_a_model_that_fails_is_one_sentence(source, precalib, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"bos_token_id": 999}))
    done = precalib("quantize", source, tmp_path / "packed")
    assert "the model cannot be run (" in done.sentence
    assert done.sentence.endswith("quantize with --activations none")
    assert not (tmp_path / "packed").exists()


def test_a_text_needs_a_beginning(source, precalib, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    done = precalib("quantize", source, tmp_path / "packed", "--feedback")
    assert "give one with --activations FILE" in done.sentence
    assert not (tmp_path / "packed").exists()


def test_a_hessian_larger_than_memory_is_refused(source, tmp_path, monkeypatch):
    needed = 16 * 160**2  # of down_proj: its Hessian, the matrix to factorize, the factor
    monkeypatch.setattr(observation, "free_memory", lambda _: needed)
    run(source, tmp_path / "enough", feedback=True)
    monkeypatch.setattr(observation, "free_memory", lambda _: needed - 1)
    with pytest.raises(
        UsageError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' alone, which has 160"
    ):
        run(source, tmp_path / "less", feedback=True)
    assert not (tmp_path / "less").exists()
    run(source, tmp_path / "random")


def test_experts_know_their_inputs(tmp_path):
    """Their column scales differ from those of a run without a pass; nothing stays unknown."""
    size = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**size, **heads, vocab_size=260, num_hidden_layers=1)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    ways = {"none": {"text": "none"}, "random": {}, "fed back": {"feedback": True}}
    scales = {}
    for name, options in ways.items():
        assert not run(tmp_path / "source", tmp_path / name, **options).unknown
        packed = load_file(tmp_path / name / "model.safetensors")
        suffix = ".column_scale"
        scales[name] = {k: v for k, v in packed.items() if ".experts." in k and k.endswith(suffix)}
    assert len(scales["none"]) == 9
    for name in ("random", "fed back"):
        assert not any(torch.equal(scales[name][key], scales["none"][key]) for key in scales[name])
