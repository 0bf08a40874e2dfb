"""The benchmark of Hessians: its moments are those of the inputs, its rows are kept."""

import json
import sys

import pytest
import torch


@pytest.fixture
def benchmark(load):
    return load("hessians")


def test_moments_of_the_layers_inputs(benchmark, source):
    model = benchmark.load_original(source, torch.float32, "cpu")
    windows = [torch.arange(20) % 7, torch.arange(20) % 5]
    seen = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    expected = sum(torch.outer(x, x) for x in torch.cat(seen)) / 40
    found = dict(benchmark.layer(model, windows))
    assert "lm_head" not in found
    statistics = found["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(statistics.hessian, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(statistics.mean_square, statistics.hessian.diagonal())


@pytest.mark.slow
def test_every_row_is_measured_once(benchmark, source, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 20)
    monkeypatch.setattr(benchmark, "WINDOW", 32)

    def run(*options):
        words = ["hessians", source, "--text", text, "--tokens", 64, "--windows", 2, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*words, "--out", tmp_path)])
        benchmark.main()
        return json.loads((tmp_path / f"hessians-{source.name}.json").read_text())["rows"]

    first = run("--recipes", "balanced-3", "--hessians", "none", "token", "--tune", "1")
    keys = [(row["recipe"], row["hessian"], row["epochs"]) for row in first]
    assert keys == [("balanced-3", kind, epochs) for kind in ("none", "token") for epochs in (0, 1)]
    assert all(row["text_kl"] > 0 and row["held_out_kl"] > 0 for row in first)
    assert len({row["text_kl"] for row in first}) == 4
    again = run("--recipes", "balanced-3", "balanced-4", "--hessians", "token", "--resume")
    assert again[:4] == first
    assert [(row["recipe"], row["hessian"]) for row in again[4:]] == [("balanced-4", "token")]
    assert again[4]["text_kl"] < first[2]["text_kl"]
