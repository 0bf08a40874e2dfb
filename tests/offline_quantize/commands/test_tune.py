"""Tuned checkpoints: nearer to the original, and all that the manifest says of them is true."""

import shutil

import pytest
import torch
from quantized_output import check, load
from tiny_models import random_llama

from offline_quantize.calibration.tune import divergence
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.commands.tune import Tuning, tune
from offline_quantize.commands.verify import verify
from offline_quantize.evaluation.kl import generate_text
from offline_quantize.evaluation.models import load_original, load_packed
from precalib_kernels.errors import OutputError, SourceError, UsageError

TUNING = Tuning(tokens=1024, window=32, epochs=2, rate=4e-3)
SCALES = (".row_scale", ".column_scale")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "source"
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 160}
    model = random_llama(**sizes, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4  # distributions that are far from even
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def packed(source, quantize):
    return quantize(source, "--recipe", "balanced-3", "--override", "down_proj=rtn-4")


def run(packed, target, source, tuning=TUNING, **options):
    return tune(packed, target, source, tuning, NullProgress(), **options)


def test_only_scales_change_and_the_manifest_stays_true(source, packed, tmp_path):
    steps = []
    target = tmp_path / "tuned"
    manifest = run(packed, target, source, report=lambda *step: steps.append(step))
    assert manifest == check(source, target) == read_manifest(target)
    assert list(verify(target, source, NullProgress())) == []
    assert manifest.run.to_json()["tuned"]["epochs"] == 2
    assert [step[:2] for step in steps] == [(done + 1, 64) for done in range(64)]
    before, after = load(packed), load(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        assert same != name.endswith(SCALES), name
    old = read_manifest(packed)
    for module, record in manifest.tensors.items():
        changed = record.relative_error != old.tensors[module].relative_error
        assert changed != module.endswith("down_proj")
        assert record.salient_share == old.tensors[module].salient_share
    assert manifest.totals.mean_relative_error != old.totals.mean_relative_error


def test_what_the_original_writes_next_is_predicted_better(source, packed, tmp_path):
    run(packed, tmp_path / "tuned", source)
    original = load_original(source, torch.float32, "cpu")
    text = torch.stack(generate_text(original, 2048, 32, seed=1))
    with torch.no_grad():
        before, after = (
            float(divergence(original, load_packed(folder, torch.float32, "cpu"), text))
            for folder in (packed, tmp_path / "tuned")
        )
    assert after < 0.9 * before


def test_a_finished_target_is_left_as_it_is(source, packed, tmp_path, contents):
    first = run(packed, tmp_path / "tuned", source)
    files = contents(tmp_path / "tuned")
    assert run(packed, tmp_path / "tuned", source) == first
    assert contents(tmp_path / "tuned") == files
    with pytest.raises(OutputError, match=r"the run there has another 'tuned: seed' \(0 instead"):
        run(packed, tmp_path / "tuned", source, Tuning(1024, 32, 2, 4e-3, seed=1))


def test_a_checkpoint_without_such_scales_is_refused(source, quantize, tmp_path):
    plain = quantize(source, "--recipe", "rtn-4")
    with pytest.raises(UsageError, match="no weight has both a row_scale and a column_scale"):
        run(plain, tmp_path / "tuned", source)
    assert not (tmp_path / "tuned").exists()


def test_another_source_is_refused(source, packed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192}
    random_llama(**sizes, tie_word_embeddings=True).bfloat16().save_pretrained(other)
    with pytest.raises(SourceError, match=r"'model\.layers\.0\.mlp\.gate_proj\.weight' has shape"):
        run(packed, tmp_path / "tuned", other)
    assert not (tmp_path / "tuned" / "config.json").exists()


def test_the_command(source, packed, precalib, tmp_path):
    target = tmp_path / "tuned"
    options = ("--against", source, "--tokens", 256, "--epochs", 1, "--seed", 3)
    ran = precalib("tune", packed, target, *options)
    assert (ran.code, ran.err) == (0, "")
    assert "effective bits" in ran.out
    assert f"{target}: tuned scales, all else as in {packed}." in ran.out
    tuned = read_manifest(target).run.to_json()["tuned"]
    assert {name: tuned[name] for name in ("tokens", "epochs", "seed")} == {
        "tokens": 256,
        "epochs": 1,
        "seed": 3,
    }
    assert precalib("verify", target, "--against", source).code == 0
    refused = precalib("tune", packed, tmp_path / "other", *options, "--device", "tpu")
    assert refused.code == 1
    assert "--device tpu: there are cpu, cuda" in refused.err
