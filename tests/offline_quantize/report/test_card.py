"""The model card: what it says, what it carries over from the source, and what it may replace."""

import hashlib
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.report.card_metadata import read_metadata

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE_CARD = """---
license: other
license_name: gemma
license_link: https://example.com/terms
language: [en, de]
tags: [chat]
pipeline_tag: text-generation
base_model: org/ancestor
base_model_relation: finetune
model-index: [{name: original, results: []}]
datasets: [org/data]
---
# The original
It beats all others.
"""


@pytest.fixture
def source(checkpoint):
    return checkpoint(
        files={"README.md": SOURCE_CARD.encode(), "LICENSE": b"terms", "tokenizer.json": b"{}"}
    )


def test_metadata_are_carried_over_and_text_is_not(source, quantize):
    target = quantize(source, "--recipe", "rtn-4")
    card = ModelCard.load(target / "README.md")  # as the Hub's own client reads it
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "gemma"
    assert data["license_link"] == "https://example.com/terms"
    assert data["language"] == ["en", "de"]
    assert data["tags"] == ["chat", "precalib", "quantized"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "vllm"
    # of a folder nobody knows whose quantization it is, only its ancestor
    assert (data["base_model"], data["base_model_relation"]) == ("org/ancestor", "finetune")
    assert not {"model-index", "model_index", "datasets"} & set(data)
    assert "beats" not in card.content
    assert "`gemma` (https://example.com/terms)" in card.text
    assert "`LICENSE`" in card.text


def test_it_says_what_the_manifest_says(source, quantize):
    target = quantize(source, "--recipe", "rtn-4", "--override", "down_proj=balanced-4")
    manifest, text = read_manifest(target), (target / "README.md").read_text()
    assert f"**{manifest.totals.bits_per_weight:.3f} effective bits**" in text
    assert "| recipe | `rtn-4` with `--override down_proj=balanced-4` |" in text
    assert f"{manifest.totals.weights:,} weights in {len(manifest.tensors)} matrices" in text
    rows = dict(re.findall(r"^\| `(rtn-4|balanced-4)` \| (\d+) \|", text, re.MULTILINE))
    assert rows == {"rtn-4": "12", "balanced-4": "2"}
    digest = hashlib.sha256((target / "precalib.json").read_bytes()).hexdigest()
    assert f"`{digest}`" in text
    assert read_metadata(target / "README.md")["precalib"]["manifest_sha256"] == digest
    assert f"torch {torch.__version__}".replace("_", r"\_") in text
    assert "has not been compared" in text
    assert "README.md" not in manifest.files


def test_a_snapshot_of_the_hub_is_named_with_its_revision(source, quantize, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--model-7b" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    target = quantize(snapshot, "--recipe", "rtn-4")
    data = read_metadata(target / "README.md")
    assert (data["base_model"], data["base_model_relation"]) == ("org/model-7b", "quantized")
    assert data["precalib"]["source_revision"] == COMMIT
    text = (target / "README.md").read_text()
    assert "# model-7b, rtn-4" in text
    assert "[org/model-7b](https://huggingface.co/org/model-7b)" in text


def test_a_folder_that_hf_download_made_has_a_revision(source, quantize):
    note = source / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\netag\n1.0\n")
    target = quantize(source, "--recipe", "rtn-4")
    assert read_metadata(target / "README.md")["precalib"]["source_revision"] == COMMIT


def test_no_card_copies_the_source(source, quantize):
    target = quantize(source, "--recipe", "rtn-4", "--no-card")
    assert (target / "README.md").read_text() == SOURCE_CARD
    assert "README.md" in read_manifest(target).files


def test_a_card_that_is_missing_from_a_finished_run_is_written(source, quantize):
    target = quantize(source, "--recipe", "rtn-4")
    before = (target / "README.md").read_bytes()
    (target / "README.md").unlink()
    quantize(source, "--recipe", "rtn-4", "--resume")
    assert (target / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    "card",
    [
        b"no metadata",
        b"---\nlicense: [unclosed\n---\n",
        b"---\n- a list\n---\n",
        b"---\nlicense: 2026-13-45\n---\n",
        b"---\nlicense: {a: b}\nlanguage: 5\n---\n",
        b"\xff\xfe---",
    ],
)
def test_a_source_without_readable_metadata_has_no_licence(checkpoint, quantize, card):
    target = quantize(checkpoint(files={"README.md": card}), "--recipe", "rtn-4")
    assert "license" not in read_metadata(target / "README.md")
    assert "names no licence" in (target / "README.md").read_text()


def test_norwegian_is_a_language(checkpoint, quantize):
    target = quantize(checkpoint(files={"README.md": b"---\nlanguage: no\n---\n"}))
    assert read_metadata(target / "README.md")["language"] == "no"


def test_text_of_the_source_cannot_break_out(checkpoint, quantize):
    hostile = {"license": "x`|\n# Heading <img src=x>", "license_link": "[a](b)\n---\nc"}
    card = f"---\n{yaml.safe_dump(hostile)}---\n".encode()
    config = {"model_type": "llama", "num_hidden_layers": 2, "architectures": ["A](x)|\n# B"]}
    target = quantize(checkpoint(files={"README.md": card}, config=config))
    text = (target / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    assert "\n# Heading" not in body
    assert "\n# B" not in body
    assert r"\[a\](b) --- c" in body
    assert read_metadata(target / "README.md")["license"] == hostile["license"]


def test_evaluations_are_added_and_the_rest_stays(source, quantize, precalib, evaluation):
    target = quantize(source, "--recipe", "rtn-4")
    bits = read_manifest(target).totals.bits_per_weight
    before = read_metadata(target / "README.md")
    result = evaluation("own.json", target, "rtn-4", bits, 0.1234)
    ran = precalib("card", target, "--eval", result, "--base-model", "org/model")
    assert ran.code == 0, ran.err
    text = (target / "README.md").read_text()
    assert "0.1234 [0.1111–0.1357]" in text
    assert "has not been compared" not in text
    after = read_metadata(target / "README.md")
    assert after.pop("base_model") == "org/model"
    assert after.pop("base_model_relation") == "quantized"
    assert after["precalib"].pop("source") == "org/model"
    assert after == {k: v for k, v in before.items() if not k.startswith("base_model")}


def test_results_of_another_checkpoint_are_refused(source, quantize, precalib, evaluation):
    target = quantize(source, "--recipe", "rtn-4")
    result = evaluation("other.json", target, "paper-4", 4.75, 0.1)
    ran = precalib("card", target, "--eval", result)
    assert "is of a checkpoint with 4.7500 effective bits" in ran.sentence


def test_an_impossible_id_is_refused(source, quantize, precalib):
    target = quantize(source, "--recipe", "rtn-4")
    assert "is no id on the Hub" in precalib("card", target, "--base-model", "a b").sentence


def test_a_card_of_somebody_else_stays(source, quantize, precalib):
    target = quantize(source, "--recipe", "rtn-4")
    (target / "README.md").write_text("# Mine")
    assert "was not written by precalib; add --force" in precalib("card", target).sentence
    assert (target / "README.md").read_text() == "# Mine"
    assert precalib("card", target, "--force", "--license", "mit").code == 0
    assert read_metadata(target / "README.md")["license"] == "mit"


def test_the_copy_of_the_source_card_gives_way(source, quantize, precalib):
    target = quantize(source, "--recipe", "rtn-4", "--no-card")
    assert precalib("card", target).code == 0
    assert read_metadata(target / "README.md")["license_name"] == "gemma"
    assert "README.md" not in read_manifest(target).files
    assert precalib("verify", target).code == 0


def test_a_dequantized_checkpoint_has_no_card_of_the_packed_one(
    source, quantize, precalib, tmp_path
):
    target = quantize(source, "--recipe", "rtn-4")
    assert precalib("dequantize", target, tmp_path / "dense").code == 0
    assert not (tmp_path / "dense" / "README.md").exists()
    assert (tmp_path / "dense" / "LICENSE").exists()


def test_equal_runs_write_equal_cards(source, quantize):
    one = quantize(source, "--recipe", "rtn-4", target="one")
    two = quantize(source, "--recipe", "rtn-4", target="two")
    assert (one / "README.md").read_bytes() == (two / "README.md").read_bytes()
    assert json.loads((one / "precalib.json").read_text())["job"]["recipe"] == "rtn-4"
