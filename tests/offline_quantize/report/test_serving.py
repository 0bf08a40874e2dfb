"""Which backends a report names, by backends made up for the tests."""

import ast
import html
from pathlib import Path

import pytest
import torch

import offline_quantize
from offline_quantize.checkpoint.packed import open_packed
from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.report import Request
from offline_quantize.report.contents import gather
from offline_quantize.report.page import render
from offline_quantize.report.serving import Serving, served_by
from precalib_kernels.backends.reference import ReferenceBackend
from precalib_kernels.backends.registry import LOWER, BackendRegistry


class Narrow(ReferenceBackend):
    name = "narrow"
    experts = False

    @classmethod
    def can_run(cls, spec):
        if reason := super().can_run(spec):
            return reason
        return "4 bits < all" if spec.layout.bits != 4 else None


class Mixture(ReferenceBackend):
    name = "mixture"
    experts = True


class Never(ReferenceBackend):
    name = "never"

    @classmethod
    def can_run(cls, spec):
        return f"<b>no {spec.device}</b> & no {spec.dtype}"


@pytest.fixture
def page(checkpoint, quantize, tmp_path):
    """The page of a checkpoint with two layouts, by the backends given."""

    def make(*backends):
        options = ("--recipe", "rtn-4", "--override", r"down_proj=rtn-3")
        target = quantize(checkpoint(), *options)
        request = Request(tmp_path / "r.html")
        return render(gather(target, request, NullProgress(), BackendRegistry(backends)))

    return make


def rows(page):
    table = page.split("Table of backends")[1].split("</table>")[0]
    return [" ".join(row.split()) for row in table.split("<tr>")[2:]]


def test_each_layout_has_its_backend_and_the_reasons_against_the_others(page, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = page(Never, Narrow, ReferenceBackend)
    four, three = sorted(rows(text), key=lambda row: "rtn-3" in row)
    never = "<div>never: &lt;b&gt;no cpu&lt;/b&gt; &amp; no torch.bfloat16</div>"
    assert '<td>12</td> <td class="words">narrow</td>' in four
    assert f"{never} <div>reference: {LOWER}</div>" in four
    assert '<td>2</td> <td class="words">reference</td>' in three
    assert f"{never} <div>narrow: 4 bits &lt; all</div>" in three
    assert "On the CPU, with activations in bfloat16" in text
    sentence = "Inside vLLM the plugin's own backends (dense, vllm_mixed_precision) are tried as"
    assert sentence in html.unescape(text)


def test_the_page_says_why_no_backend_can_run(page):
    found = rows(page(Never))
    assert len(found) == 2
    for row in found:
        assert '<td class="words">none can run</td>' in row
        assert "<div>never: &lt;b&gt;no " in row


def test_experts_of_a_layer_are_one_layer(checkpoint, weights, quantize):
    tensors = {f"layers.0.mlp.experts.{i}.up_proj.weight": weights()(64, 32) for i in range(3)}
    tensors["layers.0.self_attn.q_proj.weight"] = weights()(64, 32)
    config = {"model_type": "odd", "num_hidden_layers": 1}
    packed = open_packed(quantize(checkpoint(tensors=tensors, config=config), "--group-size", 32))
    (recipe,) = packed.config.layouts
    why = "computes one matrix per layer, not 3 experts"
    found = served_by(packed, BackendRegistry([Narrow, Mixture]), "cpu")
    assert sorted(found, key=lambda serving: serving.weights) == [
        Serving(recipe, 1, "narrow", {"mixture": LOWER}),
        Serving(recipe, 3, "mixture", {"narrow": why}),
    ]


def test_nothing_but_the_command_line_imports_the_command_line():
    """The API and the rest of the quantizer are below it."""
    root = Path(offline_quantize.__file__).parent
    for path in root.rglob("*.py"):
        if path.is_relative_to(root / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("offline_quantize.cli"), path
