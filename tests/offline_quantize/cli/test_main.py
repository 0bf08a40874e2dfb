"""The command as its users meet it: what it prints and what it refuses."""

import os
import shutil
from importlib.metadata import version

import pytest
import torch

LAYER = "model.layers.0"


def test_help_and_usage(precalib):
    ran = precalib("--help")
    assert ran.code == 0
    for command in ("quantize", "inspect", "verify", "dequantize", "recipes", "doctor"):
        assert command in ran.out
    assert precalib("quantize").code == 2
    assert precalib("quantize", "a", "b", "--jobs", -1).code == 2


def test_version(precalib):
    ran = precalib("--version")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"precalib {version('vllm-precalib')}\n"
    assert precalib().code == 2


def test_recipes(precalib):
    ran = precalib("recipes")
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 8
    assert ran.out.startswith("balanced-4 (default): 4 bits")
    assert all(line.endswith("effective bits") for line in ran.out.splitlines())


@pytest.mark.slow
def test_a_first_use(checkpoint, precalib, tmp_path, contents):
    source, target, back = checkpoint(), tmp_path / "out put", tmp_path / "back"
    before = contents(source)
    ran = precalib("quantize", source, target, "--recipe", "paper-4")
    assert (ran.code, ran.err) == (0, "")
    assert "Kept (embedding): model.embed_tokens.weight\n" in ran.out
    assert "effective bits per weight (Eq. 13 of the paper: 4.8" in ran.out
    assert f"Serve it:  vllm serve '{target}' --quantization precalib" in ran.out
    assert "expert" not in ran.out

    ran = precalib("inspect", target)
    assert ran.code == 0
    assert f"{LAYER}.self_attn.k_proj   64×128  " in ran.out
    assert "Recipe paper-4, no forward pass, made by precalib 0" in ran.out

    ran = precalib("verify", target, "--against", source)
    assert ran.code == 0
    assert "is whole: files, structure and values of 14 packed weights are right; errors" in ran.out
    assert precalib("verify", target).code == 0

    ran = precalib("dequantize", target, back)
    assert ran.code == 0
    assert "of bfloat16 weights" in ran.out
    assert contents(source) == before


def test_a_finished_run_has_nothing_to_do(checkpoint, precalib, quantize, tmp_path):
    source = checkpoint()
    quantize(source)
    ran = precalib("quantize", source, tmp_path / "target", "--resume")
    assert ran.code == 0
    assert ran.out.startswith(f"{tmp_path / 'target'} was finished before; nothing to do.\n")


@pytest.mark.parametrize("recipe", ["balanced-4", "paper-3", "rtn-4"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_dry_run_tells_the_exact_size_and_writes_nothing(
    checkpoint, precalib, quantize, tmp_path, recipe, shards
):
    source = checkpoint(shards=shards)
    ran = precalib("quantize", source, tmp_path / "target", "--recipe", recipe, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert not (tmp_path / "target").exists()
    target = quantize(source, "--recipe", recipe)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    size -= sum((target / name).stat().st_size for name in ("precalib.json", "README.md"))
    shown = f"Exact size of the output: {size:,} bytes and the manifest precalib.json"
    assert f"{shown}, and the card README.md." in ran.out
    again = precalib("quantize", source, target, "--recipe", recipe, "--dry-run", "--resume")
    assert "holds all of it already" in again.out
    other = precalib("quantize", source, target, "--recipe", recipe, "--dry-run")
    assert "exists and is not empty" in other.sentence


def test_what_is_left_out_is_told(checkpoint, precalib, tmp_path):
    source = checkpoint(files={"optimizer.pt": b"x"})
    ran = precalib("quantize", source, tmp_path / "target")
    assert "Left out (a server needs none of them): optimizer.pt\n" in ran.out
    assert not (tmp_path / "target" / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--recipe", "awq"], "unknown recipe 'awq'; there are balanced-4, "),
        (["--override", "mlp"], "--override 'mlp' is not of the form REGEX=RECIPE"),
        (["--override", "=rtn-4"], "--override '=rtn-4' is not of the form REGEX=RECIPE"),
        (["--override", "ffn=rtn-4"], "--override 'ffn' matches no module"),
        (["--override", "a=b=rtn-4"], "--override 'a=b' matches no module"),
        (["--keep", "*"], "--keep '*' is not a regular expression"),
        (["--group-size", "256"], "model.safetensors: no weight can be quantized: tensor 'model."),
        (["--group-size", "33"], "--group-size 33: give a positive multiple of 32"),
        (["--clip", "0.9"], "--clip applies to min-max grids; leave it out or take another"),
        (["--clip", "1.5"], "--clip 1.5: give a share above 0 and up to 1"),
        (["--alpha", "5"], "--alpha 5.0: give a share from 0 to below 1, as 0.05 for 5 %"),
        (["--alpha", "0.5"], "makes 64 in a group of 128, and a group has at most 32; give at"),
        (["--bits", "8"], "--bits 8: give 2, 3, 4 or 5"),
        (["--salient-bits", "9"], "--salient-bits 9: give 4 to 8"),
        (["--report", "no/such/folder/x.html"], "--report no/such/folder/x.html: there is no fol"),
        (["--keep", "up_proj"], "vLLM computes these as one layer"),
        (["--device", "meta"], "--device meta: give cpu, cuda or cuda:N"),
        (["--device", "warp:9"], "--device warp:9: give cpu, cuda or cuda:N"),
    ],
)
def test_bad_options_are_one_sentence(checkpoint, precalib, tmp_path, options, text):
    ran = precalib("quantize", checkpoint(), tmp_path / "target", *options)
    assert ran.sentence.startswith("precalib: ")
    assert text in ran.sentence
    assert not (tmp_path / "target").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(checkpoint, precalib, tmp_path):
    ran = precalib("quantize", checkpoint(), tmp_path / "target", "--device", "cuda:0")
    assert "--device cuda:0: cannot be used here (" in ran.sentence
    assert "use --device cpu" in ran.sentence


def damage_nan(root, tensors):
    tensors[f"{LAYER}.mlp.down_proj.weight"][2, 3] = float("nan")
    return f"model.safetensors: tensor '{LAYER}.mlp.down_proj.weight': weight [2, 3] is nan"


def damage_fp8(root, tensors):
    name = f"{LAYER}.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    return f"model.safetensors: tensor '{name}' has type F8_E4M3"


def damage_integer(root, tensors):
    name = f"{LAYER}.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    return f"model.safetensors: tensor '{name}' has type I8"


@pytest.mark.parametrize("damage", [damage_nan, damage_fp8, damage_integer])
def test_unfit_weights_are_one_sentence(checkpoint, weights, precalib, tmp_path, damage):
    tensors = weights().llama()
    text = damage(tmp_path, tensors)
    ran = precalib("quantize", checkpoint(tensors=tensors), tmp_path / "target")
    assert text in ran.sentence
    assert "--keep" in ran.sentence
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda root: (root / "config.json").unlink(), "config.json: the file is missing; give"),
        (lambda root: (root / "model.safetensors").unlink(), "holds no *.safetensors weights"),
        (
            lambda root: (root / "model.safetensors").rename(root / "pytorch_model.bin"),
            "pytorch_model.bin: weights in a pickle format can run code",
        ),
        (lambda root: os.truncate(root / "model.safetensors", 9999), "not a whole safetensors"),
        (lambda root: (root / "config.json").write_text("[1]"), "config.json: not a JSON object"),
    ],
)
def test_damaged_sources_are_one_sentence(checkpoint, precalib, tmp_path, damage, text):
    root = checkpoint()
    damage(root)
    ran = precalib("quantize", root, tmp_path / "target")
    assert text in ran.sentence
    assert not (tmp_path / "target").exists()


def test_errors_of_the_system_are_one_sentence(precalib, tmp_path):
    ran = precalib("inspect", tmp_path / ("x" * 300))
    assert ran.sentence.startswith("precalib: ")
    assert "File name too long" in ran.sentence
    ran = precalib("quantize", "a" * 300 + "/b", tmp_path / "target")
    assert ran.sentence.startswith("precalib: ")


def test_an_output_that_cannot_be_written(checkpoint, precalib, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ran = precalib("quantize", checkpoint(), "/proc/precalib")
    assert ran.sentence.startswith("precalib: /proc/precalib: cannot be written (")


def test_an_interrupt_tells_how_to_go_on(checkpoint, precalib, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("offline_quantize.commands.quantize.encode", interrupt)
    ran = precalib("quantize", checkpoint(), tmp_path / "target")
    assert (ran.code, ran.err) == (130, "precalib: interrupted; add --resume to continue\n")


def test_names_are_shown_as_they_are(checkpoint, weights, precalib, tmp_path):
    """Brackets are markup to rich."""
    tensors = weights().llama() | {"[bold]x[/bold].weight": torch.zeros(3)}
    target = tmp_path / "[red]out[/red]"
    source = checkpoint("[b]", tensors)
    ran = precalib("quantize", source, target)
    assert ran.code == 0
    assert "[bold]x[/bold].weight" in ran.out
    assert str(target) in ran.out
    assert str(target) in precalib("verify", target).out
    assert f"{source} " in precalib("quantize", source, source / "in").sentence + " "
    assert "/[/x]: no such" in precalib("quantize", tmp_path / "[/x]", target).sentence
