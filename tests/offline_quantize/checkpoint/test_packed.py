import pytest
import torch

from offline_quantize.checkpoint.atomic_files import JOB
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.packed import open_packed
from precalib_kernels.errors import FormatError, SourceError
from precalib_kernels.format import reference

MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def packed(checkpoint, quantize):
    return quantize(checkpoint(shards=2))


def test_a_packed_checkpoint_module_by_module(packed):
    opened = open_packed(packed)
    assert opened.root == packed
    assert opened.shape(MODULE) == (128, 160)
    tensors = opened.tensors(MODULE)
    assert [f"{MODULE}.{name}" for name in tensors] == opened.stored_names(MODULE)
    weight = reference.dequantize(tensors, opened.layout(MODULE), 160)
    assert torch.equal(opened.weight(MODULE), weight)


def test_what_is_not_packed_is_refused(checkpoint, packed, tmp_path):
    with pytest.raises(SourceError, match=r"source/config\.json: not a packed checkpoint .*; make"):
        open_packed(tmp_path / "source")
    (packed / JOB).write_text("{}")
    with pytest.raises(SourceError, match=r"target: writing it was interrupted; finish it with"):
        open_packed(packed)


def edit_config(change):
    def edit(root, edit_json):
        edit_json(root / "config.json", lambda config: change(config["quantization_config"]))

    return edit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(format_version=99), r"config\.json: .*format_version 99"),
        (lambda c: c.pop("modules"), r"config\.json: quantization_config lacks 'modules'"),
        (lambda c: c["modules"].update({MODULE: "x"}), r"config\.json: .*undefined layout 'x'"),
        (lambda c: c["modules"].update({MODULE: []}), r"config\.json: .*undefined layout \[\]"),
        (lambda c: c.update(kept=5), r"config\.json: .*"),
        (lambda c: c["layouts"]["balanced-4"].update(bits=6), r"config\.json: .*bits must be"),
        (lambda c: c["layouts"]["balanced-4"].update(new=5), r"config\.json: .*'new' is not known"),
    ],
)
def test_damaged_configurations(packed, edit_json, change, text):
    edit_config(lambda config: (change(config), None)[1])(packed, edit_json)
    with pytest.raises(FormatError, match=text):
        open_packed(packed)


def test_modules_that_are_not_there(packed, edit_json):
    edit_config(lambda config: config["modules"].update(ghost="balanced-4"))(packed, edit_json)
    with pytest.raises(FormatError, match=r"target: tensor 'ghost\.qweight' is missing; quantize"):
        open_packed(packed).tensors("ghost")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("totals"), "'totals' is missing or damaged; quantize the model again"),
        (lambda m: m["totals"].pop("weights"), "'totals' is missing"),
        (lambda m: m["totals"].update(weights="many"), "'totals' is missing"),
        (lambda m: m["totals"].update(weights=True), "'totals' is missing"),
        (lambda m: m.update(tensors=[]), "'tensors' is missing"),
        (lambda m: m["tensors"].update(x={}), "the entry of module 'x' is missing"),
        (lambda m: m["tensors"].update(x=None), "the entry of module 'x' is missing"),
        (lambda m: m["tensors"][MODULE].update(shape=[1]), f"the entry of module '{MODULE}'"),
        (lambda m: m["tensors"][MODULE].update(kl=None), f"the entry of module '{MODULE}'"),
        (lambda m: m["files"].update(x={"size": 1}), "the entry of file 'x' is missing"),
        (lambda m: m["kept"].update(x=1), "'kept' is missing"),
        (lambda m: m.update(left_out=[1]), "'left_out' is missing"),
        (lambda m: m.update(precalib=1), "'precalib' is missing"),
        (lambda m: m.pop("job"), "'job' is missing"),
    ],
)
def test_damaged_manifests(packed, edit_json, change, text):
    read_manifest(packed)
    edit_json(packed / "precalib.json", lambda manifest: (change(manifest), None)[1])
    with pytest.raises(FormatError, match=rf"^{packed}/precalib\.json: {text}"):
        read_manifest(packed)


def test_a_missing_manifest(packed):
    (packed / "precalib.json").unlink()
    with pytest.raises(FormatError, match=r"precalib\.json: the file is missing; quantize the"):
        read_manifest(packed)
