"""`precalib report` as its users meet it: what the page says, and what the command refuses."""

import dataclasses
import html.parser
import importlib.util
import json
import re

import pytest
import torch

from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.report import Request
from offline_quantize.report.contents import gather
from offline_quantize.report.measure import Positions
from offline_quantize.report.page import render

DOWN = "model.layers.0.mlp.down_proj"


class Page(html.parser.HTMLParser):
    """Ids, addresses and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.open, self.words = [], [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "input", "wbr"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action"):
                self.addresses.append(value)
            self.addresses += re.findall(r"url\((.*?)\)", value or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "dd"):
            self.words.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def report(precalib, tmp_path):
    """Runs `precalib report`; returns the page, parsed."""

    def run(directory, *options):
        out = tmp_path / "report.html"
        ran = precalib("report", directory, "--out", out, *options)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out == f"Report: {out}\n"
        page = Page(out.read_text())
        assert page.open == []
        return page

    return run


@pytest.mark.parametrize("recipe", ["balanced-4", "paper-3", "rtn-4"])
def test_it_says_what_the_manifest_says_and_is_whole(checkpoint, quantize, report, recipe):
    source = checkpoint()
    target = quantize(source, "--recipe", recipe, "--keep", r"layers\.1\.mlp\.down")
    page = report(target, "--against", source)
    manifest = json.loads((target / "precalib.json").read_text())
    totals = manifest["totals"]
    assert f"effective bits per weight {totals['bits_per_weight']:.3f}" in page.text
    assert f"relative error {totals['mean_relative_error']:.5f}" in page.text
    assert r"with --keep 'layers\.1\.mlp\.down'" in page.text
    assert "--keep, 1 tensor: model.layers.1.mlp.down_proj.weight" in page.text
    assert len(manifest["tensors"]) == 13
    for module, tensor in manifest["tensors"].items():
        numbers = f"{tensor['relative_error']:.5f} {tensor['bits_per_weight']:.3f} "
        numbers += f"{tensor['kl']:.4f} {tensor['entropy_before']:.2f} "
        assert f"{module} {numbers}{tensor['entropy_after']:.2f}" in page.text
    assert len(page.ids) == len(set(page.ids)) > 50
    for address in page.addresses:
        assert address.startswith("data:") or address.removeprefix("#") in page.ids, address
    assert ("in busiest 1 %" in page.text) == (recipe != "rtn-4")


def test_equal_checkpoints_have_equal_reports_and_an_old_one_is_replaced(
    checkpoint, quantize, precalib, tmp_path
):
    source = checkpoint()
    target = quantize(source)
    options = ("--out", tmp_path / "r.html", "--against", source, "--jobs")
    assert precalib("report", target, *options, 1).code == 0
    first = (tmp_path / "r.html").read_bytes()
    assert precalib("report", target, *options, 3).code == 0
    assert (tmp_path / "r.html").read_bytes() == first
    assert precalib("verify", target, "--against", source).code == 0


def test_it_is_named_after_the_checkpoint(checkpoint, quantize, precalib, tmp_path, monkeypatch):
    target = quantize(checkpoint())
    monkeypatch.chdir(tmp_path)
    assert precalib("report", target).out == "Report: target-report.html\n"
    monkeypatch.chdir(target)
    assert precalib("report", ".").out == "Report: target-report.html\n"


def test_what_is_missing_is_told_with_the_command_that_brings_it(
    checkpoint, quantize, report, evaluation
):
    source = checkpoint()
    target = quantize(source)
    page = report(target)
    assert f"precalib report {target} --against SOURCE" in page.text
    assert f"precalib eval {target} --against SOURCE --self-generated --json" in page.text
    assert "precalib quantize SOURCE TARGET --report FILE" in page.text
    assert "original, non-salient" not in page.text
    own = evaluation("own.json", target, "balanced-4", 4.3, 0.1)
    page = report(target, "--against", source, "--eval", own)
    assert "--against SOURCE" not in page.text
    assert "original, non-salient" in page.text


def test_quantize_writes_a_report_with_its_seconds(checkpoint, precalib, tmp_path):
    source, out = checkpoint(), tmp_path / "new" / "r.html"
    missing = precalib("quantize", source, tmp_path / "target", "--report", out)
    assert f"--report {out}: there is no folder {out.parent}; make it first" in missing.sentence
    assert not (tmp_path / "target").exists()
    out.parent.mkdir()
    ran = precalib("quantize", source, tmp_path / "target", "--report", out)
    assert (ran.code, ran.err) == (0, "")
    assert f"Report: {out}\n" in ran.out
    seconds = re.search(r" in (\d+\.\d) s: ", ran.out)[1]
    page = Page(out.read_text())
    assert f"seconds to quantize {seconds}the whole run" in page.text
    assert "original, non-salient" in page.text
    assert "quantize SOURCE TARGET" not in page.text
    again = precalib("quantize", source, tmp_path / "target", "--report", out, "--resume")
    assert again.code == 0
    assert "seconds to quantize –not recorded" in Page(out.read_text()).text


def test_other_files_are_not_replaced(checkpoint, quantize, precalib, tmp_path):
    source = checkpoint()
    target, out = quantize(source), tmp_path / "thesis.html"
    out.write_text("<html>ten years of work</html>")
    for command in (["report", target, "--out"], ["quantize", source, tmp_path / "b", "--report"]):
        ran = precalib(*command, out)
        assert f"{out}: exists and is not a report; give another {command[-1]}" in ran.sentence
        assert ("--force" in ran.sentence) == (command[-1] == "--out")
    missing = precalib("report", target, "--out", tmp_path / "none" / "r.html")
    assert "none/r.html: there is no folder" in missing.sentence
    assert not (tmp_path / "b").exists()
    assert out.read_text() == "<html>ten years of work</html>"
    assert precalib("report", target, "--out", out, "--force").code == 0
    assert "effective bits" in out.read_text()
    assert "is a directory" in precalib("report", target, "--out", tmp_path).sentence
    within = tmp_path / "c" / "r.html"  # the run makes this folder
    assert precalib("quantize", source, within.parent, "--report", within).code == 0
    assert within.exists()


def test_libraries_that_are_missing_are_named(checkpoint, precalib, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n)
    )
    ran = precalib("quantize", checkpoint(), tmp_path / "target", "--report", tmp_path / "r.html")
    assert "a report needs matplotlib; install what it needs with: pip install" in ran.sentence
    assert not (tmp_path / "target").exists()


def test_a_source_that_is_not_the_source(checkpoint, weights, quantize, precalib, tmp_path):
    target = quantize(checkpoint())
    lacking = weights().llama()
    del lacking[f"{DOWN}.weight"]
    odd = weights().llama() | {f"{DOWN}.weight": weights()(96, 160)}
    for name, tensors, text in (
        ("other", weights(seed=1).llama(), "against this source instead of the recorded"),
        ("lacking", lacking, f"tensor '{DOWN}.weight' is missing"),
        ("odd", odd, "has shape [96, 160] instead of [128, 160]"),
    ):
        against = checkpoint(name, tensors)
        ran = precalib("report", target, "--out", tmp_path / "r.html", "--against", against)
        assert text in ran.sentence
        assert "give --against the checkpoint that was quantized" in ran.sentence
    assert not (tmp_path / "r.html").exists()


def test_tensors_can_be_chosen(checkpoint, quantize, report, precalib, tmp_path):
    target = quantize(checkpoint())
    page = report(target, "--tensor", "0.*[qk]_proj", "--tensor", "up_proj")
    drawn = {name for name in page.ids if name.startswith("weight-model") and "proj-" not in name}
    parts = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.mlp.up_proj", "1.mlp.up_proj")
    assert drawn == {f"weight-model.layers.{part}" for part in parts}
    for pattern, text in (("*", "is not a regular expression"), ("x", "matches no packed module")):
        ran = precalib("report", target, "--out", tmp_path / "x.html", "--tensor", pattern)
        assert f"--tensor '{pattern}' {text}" in ran.sentence


def test_an_evaluation_is_shown(checkpoint, quantize, report, evaluation, tmp_path):
    target = quantize(checkpoint())
    task = {"questions": 50, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "same_choice": 0.9}
    task |= {"original_accuracy": 0.6, "original_accuracy_interval": [0.5, 0.7]}
    task |= {"normalisation": "by length", "difference_interval": [-0.2, 0.1]}
    files = [
        evaluation("a.json", target, "balanced-4", 4.317, 0.1078, tasks={"x/quiz.jsonl": task}),
        evaluation("b.json", tmp_path / "b", "balanced-3", 3.452, 0.3346),
        evaluation("c.json", tmp_path / "c", "rtn-4", 4.203, 0.412, text=None, tasks={"q": task}),
    ]
    page = report(target, *(part for file in files for part in ("--eval", file)))
    assert "balanced-3 3.452 0.3346 [0.3011–0.3681] 80.0% [72.0%–88.0%] 12.00" in page.text
    assert "balanced-4 quiz.jsonl 50 50.0% [40.0%–60.0%] 60.0% [50.0%–70.0%] 90.0%" in page.text
    assert "rtn-4 q 50" in page.text
    assert "balanced: original, 4,088 tokens, prose.txt" in page.text
    assert "rtn: original" not in page.text
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'class="own"><th scope="row">(\S+)</th>', text) == ["balanced-4"] * 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda value: value.pop("bits_per_weight") and None, "'bits_per_weight' is missing"),
        (lambda value: value.update(bits_per_weight=float("nan")), "'bits_per_weight' is missing"),
        (lambda value: value["text"].update(kl=float("inf")), "'text.kl' is inf"),
        (
            lambda value: value["text"].update(kl_interval=[0, float("nan")]),
            "'text.kl_interval' is",
        ),
        (lambda value: value.update(recipe=4), "'recipe' is missing or damaged"),
        (lambda value: value["text"].update(kl_interval=[1]), "'text' is missing or damaged"),
        (lambda value: value["text"].update(tokens="all"), "'text' is missing or damaged"),
        (lambda value: value.pop("text") and None, "neither 'text' nor 'tasks' was measured"),
        (
            lambda value: value.update(tasks={"a": {}}),
            "the entry of task 'a' is missing or damaged",
        ),
        (lambda value: [value], "not a JSON object"),
    ],
)
def test_a_damaged_evaluation(
    checkpoint, quantize, precalib, evaluation, edit_json, tmp_path, change, text
):
    target = quantize(checkpoint())
    file = evaluation("e.json", target, "balanced-4", 4.3, 0.1)
    edit_json(file, change)
    ran = precalib("report", target, "--out", tmp_path / "r.html", "--eval", file)
    assert f"{file}: {text}" in ran.sentence
    assert "make it with 'precalib eval … --json FILE'" in ran.sentence


def test_a_manifest_of_other_weights(checkpoint, quantize, precalib, edit_json, tmp_path):
    target = quantize(checkpoint())
    edit_json(target / "precalib.json", lambda value: value["tensors"].pop(DOWN) and None)
    ran = precalib("report", target, "--out", tmp_path / "r.html")
    assert f"{DOWN} is not both in config.json and in precalib.json" in ran.sentence


def test_names_are_text_not_markup(checkpoint, quantize, report):
    config = {"architectures": ["<script>alert(1)</script>"], "num_hidden_layers": 2}
    target = quantize(checkpoint(config=config), target='<b>&"q')
    page = report(target)
    assert '<b>&"q' in page.text
    assert "<script>alert(1)</script> · recipe" in page.text


def test_what_stands_out_is_named(checkpoint, weights, quantize, report):
    tensors = weights().llama()
    assert "✓" not in (calm := report(quantize(checkpoint("calm", tensors), target="a")).text)
    assert "No error is out of line: the largest is 1." in calm
    for column, value in ((0, 0.5), (1, -0.5), (128, 0.5), (129, -0.5)):  # wide grids
        tensors[f"{DOWN}.weight"][:, column] = value
    tensors["model.layers.1.mlp.odd.weight"] = weights()(64, 40)
    page = report(quantize(checkpoint("wild", tensors), "--recipe", "rtn-4", target="b"))
    found = re.search(
        r"1 weight has more than 1.5 times the median error of .*?at most: (\S+)", page.text
    )
    assert found[1] == DOWN
    assert "1 matrix of the decoder could not be packed" in page.text
    assert "largest error first" in page.text


def test_odd_weights(checkpoint, weights, quantize, report):
    """All zero, a single column block, experts, two stacks of layers."""
    tensors = {
        "encoder.layers.0.mlp.experts.3.up_proj.weight": weights()(64, 32),
        "encoder.layers.0.mlp.experts.4.up_proj.weight": weights()(64, 32),
        "decoder.layers.0.up_proj.weight": torch.zeros(64, 128, dtype=torch.bfloat16),
    }
    source = checkpoint(tensors=tensors, config={"model_type": "odd", "num_hidden_layers": 1})
    page = report(quantize(source, "--group-size", 32), "--against", source)
    assert "encoder.mlp.experts.*.up_proj" in page.text
    assert "decoder.up_proj" in page.text
    assert "odd · recipe balanced-4 --group-size 32" in page.text


def test_only_zeros(checkpoint, quantize, report):
    tensors = {"layers.0.up_proj.weight": torch.zeros(64, 128, dtype=torch.bfloat16)}
    page = report(quantize(checkpoint(tensors=tensors)))
    assert "No error is out of line" in page.text


def test_the_page_of_a_large_model_is_small(checkpoint, quantize, tmp_path):
    """32 layers of 4096 inputs, and so many experts that not all are listed."""
    target = quantize(checkpoint(), "--recipe", "paper-4")
    contents = gather(target, Request(tmp_path / "r.html"), NullProgress())
    columns = torch.randint(0, 600, (4096,), generator=torch.Generator().manual_seed(0))
    where = Positions(columns, torch.rand(32, 64, generator=torch.Generator().manual_seed(0)))

    def grown(layers, kinds):
        return [
            dataclasses.replace(
                weight,
                module=f"{weight.module}.{i}",
                layer=i,
                kind=f"{weight.kind}{j}",
                shape=(4096, 4096),
                positions=where,
            )
            for i in range(layers)
            for j in range(kinds)
            for weight in contents.weights[:7]
        ]

    page = render(dataclasses.replace(contents, weights=grown(32, 1)))
    assert page.count('<tr><th scope="row" data-value') == 224
    assert len(page) < 1_000_000
    page = render(dataclasses.replace(contents, weights=grown(30, 10)))
    assert page.count('<tr><th scope="row" data-value') == 2000
    assert "The 2,000 weights of 2,100 with the largest error" in page
    assert len(page) < 4_000_000


def test_an_output_head_belongs_to_no_layer(checkpoint, quantize, report):
    page = report(quantize(checkpoint(), "--recipe", "rtn-4", "--head", "rtn-3"))
    assert "Error by layer and kind 0 1 – layer lm_head mlp.down_proj" in page.text
