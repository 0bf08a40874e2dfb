"""`precalib quantize --transform value-output`: what it writes, resumes, and lets others verify."""

import functools
import json
import os

import pytest
import torch
from killed_runs import Disk, Killed, run
from quantized_output import load, unpack
from safetensors.torch import load_file, save_file
from tiny_models import GROUPED_QUERY_CONFIG

from offline_quantize import quantize_checkpoint
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.commands import value_output
from offline_quantize.commands.dequantize import dequantize
from offline_quantize.commands.verify import verify
from offline_quantize.method.value_output_learning import learn
from precalib_kernels.errors import OutputError, SourceError

ATTENTION, SIZE, QUERIES = "model.layers.{}.self_attn", 16, 2
OPTIONS = ("--transform", "value-output")
FILE = "precalib.transforms"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(value_output, "learn", functools.partial(learn, steps=16))


@pytest.fixture
def tensors(weights):
    make = weights()
    made = make.llama()
    for layer in (0, 1):
        made[f"{ATTENTION.format(layer)}.v_proj.bias"] = make(64)
        made[f"{ATTENTION.format(layer)}.v_proj.weight"][3] *= 8
    return made


@pytest.fixture
def source(checkpoint, tensors):
    return checkpoint(tensors=tensors, config=GROUPED_QUERY_CONFIG, shards=2)


def products(value, output):
    """W_o·W_v of each query head; columns of `value` may also be a bias."""
    found = []
    for head in range(GROUPED_QUERY_CONFIG["num_attention_heads"]):
        rows = value[head // QUERIES * SIZE : (head // QUERIES + 1) * SIZE].double()
        found.append(output[:, head * SIZE : (head + 1) * SIZE].double() @ rows)
    return torch.stack(found)


def relative(found, expected):
    return float((found - expected).square().sum() / expected.square().sum())


def faults(root, against=None):
    return list(verify(root, against, NullProgress()))


@pytest.mark.parametrize("recipe", ["balanced-5", "rtn-4"])
def test_products_of_the_packed_pair_are_the_sources(source, tensors, quantize, recipe):
    target = quantize(source, "--recipe", recipe, *OPTIONS)
    found, kept = unpack(target)
    for layer in (0, 1):
        name = ATTENTION.format(layer)
        before = [tensors[f"{name}.{part}.weight"].float() for part in ("v_proj", "o_proj")]
        after = [found[f"{name}.{part}"] for part in ("v_proj", "o_proj")]
        assert relative(products(*after), products(*before)) < 0.05
        for original, packed in zip(before, after, strict=True):
            assert relative(packed, original) > 0.06  # more than rounding changes
        bias = tensors[f"{name}.v_proj.bias"]
        changed = kept[f"{name}.v_proj.bias"]
        assert changed.dtype == bias.dtype
        found_bias = products(changed[:, None].float(), after[1])
        assert relative(found_bias, products(bias[:, None].float(), before[1])) < 0.05


@pytest.mark.parametrize("recipe", ["rtn-4", "paper-4", "balanced-4"])
def test_recorded_errors_are_those_of_the_transformed_weights(source, tensors, quantize, recipe):
    target = quantize(source, "--recipe", recipe, *OPTIONS)
    found, _ = unpack(target)
    matrices = load_file(target / FILE)
    records = read_manifest(target).tensors
    for layer in (0, 1):
        name = ATTENTION.format(layer)
        chosen = matrices[f"{name}.value_output"].double()
        identity = torch.eye(SIZE).double().expand(4, SIZE, SIZE)
        orthogonal = torch.allclose(chosen @ chosen.mT, identity, atol=1e-5)
        assert orthogonal == (recipe == "balanced-4")
        value = tensors[f"{name}.v_proj.weight"].double().view(4, SIZE, -1)
        error = relative(found[f"{name}.v_proj"], (chosen @ value).flatten(0, 1))
        assert records[f"{name}.v_proj"].relative_error == pytest.approx(error, rel=1e-3)


def test_other_tensors_are_as_without_a_transform(source, quantize):
    plain, target = quantize(source, target="plain"), quantize(source, *OPTIONS)
    before, after = load(plain), load(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "v_proj" not in name and "o_proj" not in name:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert not (plain / FILE).exists()
    text = (plain / "precalib.json").read_text()
    assert '"transform"' not in text
    assert json.loads((target / "precalib.json").read_text())["job"]["transform"] == "value-output"
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["recipe"].endswith(" --transform value-output")


def test_verify_knows_the_transform(source, quantize, precalib):
    target = quantize(source, *OPTIONS)
    assert faults(target) == []
    assert faults(target, source) == []
    ran = precalib("verify", target, "--against", source)
    assert ran.code == 0, ran.err


def test_verify_finds_another_source(checkpoint, source, tensors, quantize):
    target = quantize(source, *OPTIONS)
    name = ATTENTION.format(0)
    tensors[f"{name}.v_proj.bias"] = -tensors[f"{name}.v_proj.bias"]
    tensors[f"{name}.o_proj.weight"] = tensors[f"{name}.o_proj.weight"].flip(0)
    found = "\n".join(
        faults(target, checkpoint("other", tensors, config=GROUPED_QUERY_CONFIG, shards=2))
    )
    assert f"tensor '{name}.v_proj.bias' is not the source's" in found
    assert f"{name}.o_proj: relative error" in found
    assert len(found.splitlines()) == 2


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 99)])
def test_verify_misses_the_matrices(source, quantize, damage):
    target = quantize(source, *OPTIONS)
    damage(target / FILE)
    (alone,) = faults(target)
    assert f"{FILE}: " in alone
    first, second = faults(target, source)
    assert "without it nothing can be compared with the source" in first + second
    assert alone in (first, second)


def test_changed_matrices_are_found(source, quantize):
    target = quantize(source, *OPTIONS)
    matrices = load_file(target / FILE)
    name = f"{ATTENTION.format(1)}.value_output"
    matrices[name] = matrices[name].flip(0).contiguous()
    save_file(matrices, target / FILE)
    found = "\n".join(faults(target, source))
    assert f"{FILE}: its" in found
    assert f"{ATTENTION.format(1)}.v_proj: relative error" in found


def test_jobs_and_equal_runs_give_equal_bytes(source, quantize, contents):
    one = contents(quantize(source, *OPTIONS, "--jobs", 1, target="one"))
    assert one == contents(quantize(source, *OPTIONS, "--jobs", 3, target="three"))


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_fourth_step_and_resumed(source, tmp_path, contents, monkeypatch, torn):
    options = {"transform": "value-output"}
    run(source, tmp_path / "whole", **options)
    expected, disk, last, killed = contents(tmp_path / "whole"), Disk(monkeypatch), 0, True
    while killed:
        last += 4
        target = tmp_path / f"killed-{last}"
        killed = False
        disk.kill_at(last, torn)
        try:
            run(source, target, **options)
        except Killed:
            killed = True
        disk.live()
        if killed:
            run(source, target, resume=True, **options)
            assert contents(target) == expected, f"killed at step {last}"
    assert last > 60


def test_a_resumed_run_does_not_learn_again(source, tmp_path, monkeypatch):
    options = {"transform": "value-output"}

    class Interrupting(NullProgress):
        def begin(self, name):
            if name.endswith("o_proj.weight"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "target", progress=Interrupting(), **options)
    assert (tmp_path / "target" / FILE).exists()
    monkeypatch.setattr(value_output, "learn", None)
    run(source, tmp_path / "target", resume=True, **options)
    assert faults(tmp_path / "target", source) == []


def test_a_run_without_transform_does_not_continue_one_with(source, tmp_path):
    class Interrupting(NullProgress):
        def begin(self, _):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "target", progress=Interrupting(), transform="value-output")
    with pytest.raises(OutputError, match="the run there has another 'transform'"):
        run(source, tmp_path / "target", resume=True)


def test_dequantized_it_is_an_ordinary_checkpoint(source, tensors, quantize, tmp_path):
    target = quantize(source, "--recipe", "balanced-5", *OPTIONS)
    dequantize(target, tmp_path / "back", torch.float32, 1, NullProgress())
    back = load(tmp_path / "back")
    assert not (tmp_path / "back" / FILE).exists()
    assert back.keys() == tensors.keys()
    for layer in (0, 1):
        names = [f"{ATTENTION.format(layer)}.{part}.weight" for part in ("v_proj", "o_proj")]
        expected = products(*(tensors[name].float() for name in names))
        assert relative(products(*(back[name] for name in names)), expected) < 0.01


def test_a_report_compares_with_the_transformed_source(source, quantize, precalib, tmp_path):
    target = quantize(source, *OPTIONS)
    out = tmp_path / "report.html"
    ran = precalib(
        "report", target, "--out", out, "--against", source, "--tensor", "[vo]_proj", "--jobs", 1
    )
    assert ran.code == 0, ran.err
    assert out.exists()


def test_weights_that_are_not_finite_are_named(checkpoint, tensors, tmp_path):
    name = f"{ATTENTION.format(1)}.v_proj.weight"
    tensors[name][2, 5] = float("nan")
    source = checkpoint(tensors=tensors, config=GROUPED_QUERY_CONFIG)
    with pytest.raises(SourceError, match=rf"'{name}': weight \[2, 5\] is nan"):
        run(source, tmp_path / "target", transform="value-output")
    assert not (tmp_path / "target").exists()


def test_the_python_function_writes_the_same(source, quantize, tmp_path, contents):
    by_command = contents(quantize(source, *OPTIONS))
    quantize_checkpoint(source, tmp_path / "by-function", transform="value-output", jobs=1)
    assert contents(tmp_path / "by-function") == by_command


def test_the_plan_counts_the_matrices(source, quantize, precalib, tmp_path):
    ran = precalib("quantize", source, tmp_path / "none", *OPTIONS, "--dry-run")
    assert ran.code == 0, ran.err
    target = quantize(source, *OPTIONS)
    assert (target / FILE).stat().st_size > 2 * 4 * SIZE * SIZE * 4


def test_nothing_goes_through_the_model_first(source, precalib, tmp_path):
    ran = precalib("quantize", source, tmp_path / "target", *OPTIONS)
    assert ran.code == 0, ran.err
    assert "A transform changes the inputs of output projections" in ran.out
    for options in (["--activations", "random"], ["--feedback"]):
        ran = precalib("quantize", source, tmp_path / "other", *OPTIONS, *options)
        assert "leave it out, or add --activations none" in ran.sentence
