"""The public API: ten names at most, cheap to import, and the examples of its page run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import offline_quantize
from offline_quantize import api

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_ten_names_each_described():
    names = offline_quantize.__all__
    assert len(names) <= 10
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(names)
    for name in names:
        assert name in dir(offline_quantize)
        assert getattr(offline_quantize, name) is getattr(api, name)
        assert getattr(offline_quantize, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        offline_quantize.quantise  # noqa: B018


def test_the_import_is_cheap():
    code = "import sys, offline_quantize; print('torch' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_examples_of_the_page_run(byte_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = byte_llama(hidden_size=128, intermediate_size=160, max_position_embeddings=128)
    shutil.copytree(source, "model")
    Path("text.txt").write_text("A text of some length decides. " * 20)
    page, names = PAGE.read_text(), {}
    examples = EXAMPLE.findall(page)
    assert len(examples) == page.count("```python")
    for example in examples:
        before = page[: page.index(example)].count("\n")  # so that errors name the page's lines
        exec(compile("\n" * before + example, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "KL(source ‖ packed) per token: 0." in printed
    assert "unknown recipe 'balanced-9'; there are balanced-4" in printed


def test_the_function_and_the_command_write_the_same_bytes(
    checkpoint, quantize, contents, tmp_path
):
    source = checkpoint()
    target = quantize(source, "--bits", 3, "--group-size", 64, "--override", "mlp=rtn-4")
    outcome = offline_quantize.quantize_checkpoint(
        source, tmp_path / "api", group_size=64, bits=3, overrides={"mlp": "rtn-4"}, jobs=1
    )
    assert outcome.seconds is not None
    assert contents(tmp_path / "api") == contents(target)


def test_a_weight_there_and_back():
    weight = 0.02 * torch.randn((40, 160), generator=torch.Generator().manual_seed(0))
    recipe = offline_quantize.find_recipe("balanced-4", alpha=0.05)
    packed = offline_quantize.quantize_weight(weight, recipe)
    assert packed.layout == recipe.layout
    again = offline_quantize.dequantize_weight(packed.tensors, packed.layout)
    error = float((again - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(packed.statistics.relative_error, rel=1e-4)
    default = offline_quantize.quantize_weight(weight)
    assert default.layout == offline_quantize.list_recipes()["balanced-4"].layout


def broken(tensors: dict[str, Tensor], missing: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != missing}


@pytest.mark.parametrize("missing", ["qweight", "scales", "column_scale"])
def test_packed_tensors_that_do_not_fit_are_refused(missing):
    packed = offline_quantize.quantize_weight(torch.ones(4, 128))
    with pytest.raises(offline_quantize.PrecalibError, match=f"'{missing}' is missing"):
        offline_quantize.dequantize_weight(broken(packed.tensors, missing), packed.layout)


@pytest.mark.parametrize("options", [{"jobs": 2}, {"device": "cuda:0"}])
def test_what_does_not_go_with_a_cluster_is_refused(tmp_path, options):
    with pytest.raises(offline_quantize.PrecalibError, match="leave"):
        offline_quantize.quantize_checkpoint(tmp_path, tmp_path / "x", ray="auto", **options)


def test_errors_name_the_weight_and_the_value():
    weight = torch.ones(4, 128)
    weight[0, 3] = torch.nan
    with pytest.raises(offline_quantize.PrecalibError, match=r"^q_proj: weight \[0, 3\] is nan"):
        offline_quantize.quantize_weight(weight, name="q_proj")
    with pytest.raises(offline_quantize.PrecalibError, match="unknown recipe 'none'"):
        offline_quantize.quantize_weight(torch.ones(4, 128), "none")
    with pytest.raises(TypeError, match="bitz"):
        offline_quantize.find_recipe("balanced-4", bitz=3)
