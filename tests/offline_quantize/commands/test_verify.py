"""`precalib verify` finds what happens to checkpoints."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.commands.verify import verify, workload
from offline_quantize.method.weight_statistics import relative_error

MODULE = "model.layers.0.mlp.down_proj"
FILE = "model.safetensors"


@pytest.fixture
def source(checkpoint):
    return checkpoint()


@pytest.fixture(params=["balanced-4", "paper-4", "rtn-3"])
def packed(request, source, quantize):
    return quantize(source, "--recipe", request.param)


@pytest.fixture
def rtn(source, quantize):
    return quantize(source, "--recipe", "rtn-4")


def faults(root, against=None):
    return list(verify(root, against, NullProgress()))


def rewrite(root, change):
    """Change tensors and record the file as if it had been written that way."""
    tensors = load_file(root / FILE)
    change(tensors)
    save_file(tensors, root / FILE, metadata={"format": "pt"})
    manifest = json.loads((root / "precalib.json").read_text())
    data = (root / FILE).read_bytes()
    manifest["files"][FILE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "precalib.json").write_text(json.dumps(manifest))


def test_a_sound_checkpoint_has_no_faults(packed, source):
    assert faults(packed) == []
    assert faults(packed, source) == []


def test_progress_counts_every_byte(packed, source):
    class Recorder(NullProgress):
        done = 0

        def advance(self, nbytes):
            self.done += nbytes

    for against in (None, source):
        recorder = Recorder()
        assert list(verify(packed, against, recorder)) == []
        assert recorder.done == workload(packed, against)


def test_any_flipped_byte_is_found(packed):
    path = packed / FILE
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    for where in (header, header + 1001, len(data) - 1):
        changed = bytearray(data)
        changed[where] ^= 1
        path.write_bytes(changed)
        found = faults(packed)
        assert found[0] == f"{path}: its sha256 is not the recorded one; copy the checkpoint again"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "code/deep/bytes.txt"])
def test_changed_and_missing_files(packed, file):
    path = packed / file
    if file == "config.json":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        path.write_bytes(b"[]")
    assert faults(packed) == [
        f"{path}: its size is not the recorded one; copy the checkpoint again"
    ]
    if file != "config.json":
        path.unlink()
        assert faults(packed) == [f"{path}: the file is missing; copy the checkpoint again"]


def test_strange_weight_files_are_found(packed):
    save_file({"x": torch.zeros(1)}, packed / "extra.safetensors")
    text = f"{packed / 'extra.safetensors'}: is not part of the checkpoint; remove it, or vLLM may"
    assert [fault[: len(text)] for fault in faults(packed)] == [text]


def test_missing_tensors_are_found(rtn):
    rewrite(rtn, lambda tensors: tensors.pop(f"{MODULE}.scales"))
    (found,) = faults(rtn)
    assert re.search(rf"{MODULE}: tensor 'scales' is missing; quantize the model again", found)
    rewrite(rtn, lambda tensors: tensors.pop(f"{MODULE}.qweight"))
    (found,) = faults(rtn)
    assert f"tensor '{MODULE}.qweight' is missing" in found
    rewrite(rtn, lambda tensors: tensors.pop("model.norm.weight"))
    assert "tensor 'model.norm.weight' is missing; quantize the model again" in faults(rtn)[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_found(rtn, value):
    rewrite(rtn, lambda tensors: tensors[f"{MODULE}.scales"].__setitem__((5, 1), value))
    (found,) = faults(rtn)
    assert f"tensor '{MODULE}.scales' holds a value that is not finite" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("recipe", "suffix"), [
    ("balanced-4", "column_scale"), ("balanced-4", "row_scale"),
    ("paper-4", "salient_scale"), ("paper-4", "salient_offset"),
])  # fmt: skip
def test_other_side_tensors_that_are_not_finite(source, quantize, recipe, suffix, value):
    packed, name = quantize(source, "--recipe", recipe), f"{MODULE}.{suffix}"
    rewrite(packed, lambda tensors: tensors[name].__setitem__((-1, -1), value))
    for against in (None, source):
        (found,) = faults(packed, against)
        assert f"tensor '{name}' holds a value that is not finite" in found


@pytest.mark.parametrize("factor", [0.0, 0.5, 30.0])
def test_a_ruined_weight_is_found_though_its_error_is_recorded(source, quantize, edit_json, factor):
    packed = quantize(source)
    rewrite(packed, lambda tensors: tensors[f"{MODULE}.column_scale"][:, ::2].mul_(factor))
    original = load_file(source / FILE)[f"{MODULE}.weight"].float()
    error = relative_error(original, open_packed(packed).weight(MODULE))
    edit_json(
        packed / "precalib.json",
        lambda manifest: manifest["tensors"][MODULE].update(relative_error=error),
    )
    assert faults(packed) == []
    (found,) = faults(packed, source)
    assert re.search(
        rf"{MODULE}: relative error {error:.3g} where its recipe gives 0\.00\d+;", found
    )
    assert "quantize the model again, and keep this weight with --keep" in found


def test_a_recipe_that_is_not_recorded(packed, source, edit_json):
    edit_json(packed / "precalib.json", lambda manifest: manifest["job"].pop("recipes") and None)
    found = faults(packed, source)
    assert len(found) == 14
    assert "its recipe is missing or damaged in precalib.json; quantize the" in found[0]


def test_wrong_shapes_and_types_are_found(rtn):
    name = f"{MODULE}.scales"
    rewrite(rtn, lambda tensors: tensors.update({name: tensors[name].float()}))
    (found,) = faults(rtn)
    assert f"{MODULE}: tensor 'scales' is [128, 2] torch.float32, expected [128, 2]" in found
    rewrite(rtn, lambda tensors: tensors.update({name: tensors[name].half()[:100].contiguous()}))
    (found,) = faults(rtn)
    assert "expected [128, 2] torch.float16" in found


def test_positions_out_of_range_are_found(source, quantize):
    packed = quantize(source, "--recipe", "paper-4")
    rewrite(packed, lambda tensors: tensors[f"{MODULE}.salient"].fill_(255))
    (found,) = faults(packed)
    assert found.startswith(f"{packed}: {MODULE}: 'salient")


def test_tables_that_disagree_are_found(rtn, edit_json):
    edit_json(rtn / "precalib.json", lambda m: (m["tensors"].pop(MODULE), None)[1])
    text = f"{rtn}: {MODULE} is not both in config.json and in precalib.json; quantize the model a"
    assert [fault[: len(text)] for fault in faults(rtn)] == [text]


def test_another_source_is_found(packed, checkpoint, weights):
    other = checkpoint("other", weights(seed=1).llama())
    found = faults(packed, other)
    assert sum("relative error" in fault for fault in found) == 14
    assert sum("is not the source's; this is not the source" in fault for fault in found) >= 2


def test_a_source_that_differs_in_a_kept_tensor_only(packed, checkpoint, weights):
    tensors = weights().llama()
    tensors["lm_head.weight"][0, 0] += 1
    (found,) = faults(packed, checkpoint("other", tensors))
    assert found.startswith(f"{packed / FILE}: tensor 'lm_head.weight' is not the source's")


def test_a_source_of_other_shapes_and_names(rtn, checkpoint, weights):
    tensors = weights().llama()
    del tensors[f"{MODULE}.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = weights()(32, 128)
    tensors["extra"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(5)
    found = "\n".join(faults(rtn, checkpoint("other", tensors)))
    assert f"other: tensor '{MODULE}.weight' is missing; this is not the source" in found
    assert "up_proj: the source weight has shape [32, 128]; this is not the source" in found
    assert "tensor 'extra' of the source is missing" in found
    assert "tensor 'model.norm.weight' is not the source's" in found


def test_a_source_with_nan_does_not_pass(rtn, checkpoint, weights):
    tensors = weights().llama()
    tensors[f"{MODULE}.weight"][0, 0] = float("nan")
    (found,) = faults(rtn, checkpoint("other", tensors))
    assert f"{MODULE}: relative error nan instead of the recorded" in found


def test_faults_are_counted_by_the_command(rtn, precalib):
    (rtn / "tokenizer.json").unlink()
    (rtn / "generation_config.json").write_text("[]!")
    ran = precalib("verify", rtn)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 3
    assert ran.err.endswith(f"precalib: {rtn} has 2 faults\n")
    assert ran.out == ""
