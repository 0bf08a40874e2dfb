"""The manifest as a typed value: its bytes, its older forms, and the field that an error names."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from offline_quantize.checkpoint.atomic_files import MANIFEST, json_bytes
from offline_quantize.checkpoint.manifest import Manifest, read_manifest, record_file
from offline_quantize.checkpoint.progress import NullProgress
from precalib_kernels.errors import FormatError

DIGEST = "0" * 64
MODULE = "model.layers.0.mlp.down_proj"


def fields() -> dict[str, Any]:
    """A manifest in JSON, every field in the order of the file."""
    return {
        "format_version": 1,
        "precalib": "0.1.0",
        "job": {
            "format_version": 1,
            "precalib": "0.1.0",
            "recipe": "rtn-4",
            "recipes": {"rtn-4": {"alpha": 0.0}},
            "overrides": ["mlp=rtn-3"],
            "keep": [],
            "head": None,
            "activations": None,
            "source": {"config.json": DIGEST, "model.safetensors": {"size": 9, "header": DIGEST}},
        },
        "totals": {
            "weights": 20480,
            "source_bytes": 40960,
            "stored_bytes": 10752,
            "kept_bytes": 0,
            "bits_per_weight": 4.2,
            "eq13_bits_per_weight": 4.25,
            "mean_relative_error": 1e-05,
            "salient_overflow": 0,
        },
        "files": {"config.json": {"size": 20, "sha256": DIGEST}},
        "tensors": {
            MODULE: {
                "file": "model.safetensors",
                "origin": f"{MODULE}.weight",
                "shape": [128, 160],
                "dtype": "BF16",
                "recipe": "rtn-4",
                "bits_per_weight": 4.2,
                "relative_error": 0.01,
                "kl": 0.0,
                "entropy_before": 7.5,
                "entropy_after": 3.5,
                "salient_share": 0.0,
                "salient_overflow": 0,
            }
        },
        "kept": {"model.embed_tokens.weight": "embedding"},
        "left_out": ["optimizer.pt"],
    }


def test_the_bytes_come_back(tmp_path):
    (tmp_path / MANIFEST).write_bytes(json_bytes(fields()))
    manifest = read_manifest(tmp_path)
    assert manifest.tensors[MODULE].shape == (128, 160)
    assert manifest.unquantized == {"model.embed_tokens.weight": "embedding"}
    assert json_bytes(manifest.to_json()) == (tmp_path / MANIFEST).read_bytes()


def test_what_quantize_writes_has_every_field_in_order(checkpoint, quantize):
    target = quantize(checkpoint(), "--recipe", "rtn-4")
    written = json.loads((target / MANIFEST).read_text())
    expected = fields()
    assert list(written) == list(expected)
    for part in ("job", "totals"):
        assert list(written[part]) == list(expected[part])
    assert list(written["tensors"][MODULE]) == list(expected["tensors"][MODULE])
    assert json_bytes(read_manifest(target).to_json()) == (target / MANIFEST).read_bytes()


def test_a_manifest_of_the_first_writer(tmp_path):
    """It recorded neither its own version nor a head, activations or the origin of weights."""
    old = fields()
    del old["job"]["precalib"], old["job"]["head"], old["job"]["activations"]
    del old["tensors"][MODULE]["origin"]
    (tmp_path / MANIFEST).write_bytes(json_bytes(old))
    manifest = read_manifest(tmp_path)
    assert manifest.run.precalib is None
    assert manifest.run.head is manifest.run.activations is None
    assert manifest.origin_of(MODULE) == f"{MODULE}.weight"
    assert manifest.origin_of("unknown") == "unknown.weight"


def test_fields_of_a_later_writer(tmp_path):
    """They are ignored, but for those of the run, which tell it from another."""
    new = fields()
    for part in (new, new["job"], new["totals"], new["tensors"][MODULE]):
        part["new"] = 5
    (tmp_path / MANIFEST).write_bytes(json_bytes(new))
    manifest = read_manifest(tmp_path)
    assert manifest.run.to_json() == new["job"]
    assert "new" not in manifest.totals.to_json()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("files"), r"'files' is missing or damaged; quantize"),
        (lambda m: m.pop("format_version"), r"'format_version' is missing or damaged; quantize"),
        (
            lambda m: m["totals"].update(weights="many"),
            r"'totals' is missing or damaged \(weights: input should be a valid integer\); quant",
        ),
        (
            lambda m: m["totals"].pop("kept_bytes"),
            r"'totals' is missing or damaged \(kept_bytes: field required\); quantize",
        ),
        (
            lambda m: m["tensors"][MODULE].update(shape=[1, True]),
            rf"the entry of module '{MODULE}' is missing or damaged \(shape\.1: input should be",
        ),
        (
            lambda m: m["files"]["config.json"].update(size=1.5),
            r"the entry of file 'config\.json' is missing or damaged \(size: input should be",
        ),
        (lambda m: m["job"].update(overrides=5), r"'job' is missing or damaged \(overrides: "),
    ],
)
def test_errors_name_the_field(tmp_path, change, text):
    value = fields()
    change(value)
    (tmp_path / MANIFEST).write_bytes(json_bytes(value))
    with pytest.raises(FormatError, match=rf"^{tmp_path}/precalib\.json: {text}"):
        read_manifest(tmp_path)


def test_a_manifest_does_not_change():
    manifest = Manifest.model_validate(fields())
    with pytest.raises(ValidationError, match="frozen"):
        manifest.precalib = "2"


def test_names_of_files_that_are_no_text(checkpoint, quantize):
    name = b"vocab-\xff.txt"
    source = checkpoint()
    path = (source / "x").with_name(name.decode(errors="surrogateescape"))
    path.write_bytes(b"a b")
    target = quantize(source, "--recipe", "rtn-4")
    record = read_manifest(target).files[path.name]
    assert record == record_file(target / path.name, NullProgress())
