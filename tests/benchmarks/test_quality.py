"""Rows of the quality benchmark: what is measured, at which bits, and what is put back."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_quantize.checkpoint.progress import NullProgress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.commands.quantize import quantize
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import SourceError

pytestmark = pytest.mark.slow

Load = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    words = {"prose": "One text decides, ", "letters": "and the other one is shown. "}
    for name, text in words.items():
        (tmp_path / f"{name}.txt").write_text(text * 20)
    return [tmp_path / f"{name}.txt" for name in words]


@pytest.fixture
def run(load: Load, source: Path, texts: list[Path], tmp_path: Path, monkeypatch: Any) -> Any:
    quality = load("quality")

    def run(*arguments: str | Path) -> list[dict[str, Any]]:
        command = ["quality.py", source, "--text", *texts, "--out", tmp_path, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        quality.main()
        rows: list[dict[str, Any]] = json.loads((tmp_path / "quality.json").read_text())["rows"]
        return rows

    return run


def packed(source: Path, target: Path, keep: list[str]) -> Path:
    plan = make_plan(open_checkpoint(source), Options("rtn-3", {}, [], keep))
    quantize(plan, target, NullProgress(), 1)
    return target


def test_recipes_go_through_the_format(load: Load) -> None:
    weight = 0.02 * torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    (method,) = load("quality").recipes(["rtn-4"])
    ((name, found, stored),) = method.quantize({"w": weight})
    assert (name, method.name, method.variant) == ("w", "precalib rtn", "rtn-4")
    assert stored == 24 * 160 * 4 + 24 * 2 * (16 + 8)
    assert 0.003 < float((found - weight).square().mean() / weight.square().mean()) < 0.02


def test_target_sizes_that_the_model_cannot_have_are_left_out(run: Any) -> None:
    rows = run("--only", "target-bits")
    variants = [row["variant"] for row in rows]
    assert variants == ["3.3", "3.85", "4.3", "4.8"]  # small rows cost more
    for row in rows:
        assert float(row["variant"]) - 0.3 < row["bits"] <= float(row["variant"])
    kl = [row["texts"]["prose"]["kl"] for row in rows]
    assert kl == sorted(kl, reverse=True)


def test_checkpoints_and_recipes_agree(run: Any, source: Path, tmp_path: Path) -> None:
    whole = packed(source, tmp_path / "whole", [])
    part = packed(source, tmp_path / "part", [r"\.mlp\."])
    rows = run("--only", "rtn-3", "--checkpoint", whole, part)
    by_variant = {row["variant"]: row for row in rows}
    assert set(by_variant) == {"rtn-3", "whole", "part"}
    assert by_variant["whole"]["texts"] == by_variant["rtn-3"]["texts"]
    assert by_variant["whole"]["bits"] == by_variant["rtn-3"]["bits"]
    attention, mlp = 128 * (128 + 64 + 64 + 128), 128 * 160 * 3
    manifest = json.loads((part / "precalib.json").read_text())["totals"]
    assert manifest["weights"] == 2 * attention
    bits = (manifest["bits_per_weight"] * attention + 16 * mlp) / (attention + mlp)
    assert by_variant["part"]["bits"] == pytest.approx(bits)
    for text in ("prose", "letters"):
        assert by_variant["part"]["texts"][text]["kl"] < by_variant["whole"]["texts"][text]["kl"]
    page = (tmp_path / "quality.md").read_text()
    assert page.count("| precalib checkpoint |") == 2
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_rows_stay(run: Any) -> None:
    (first,) = run("--only", "NF4")
    both = run("--only", "rtn-3")
    assert [row["method"] for row in both] == ["precalib rtn", "NF4"]
    assert both[1] == first
    assert run("--only", "NF4", "rtn-3", "--resume") == both  # even the seconds


def test_a_new_text(run: Any, texts: list[Path], tmp_path: Path) -> None:
    (old,) = run("--only", "NF4")
    run("--only", "rtn-3")
    new = texts[0].rename(texts[0].with_stem("new"))
    ours, peer = run("--only", "NF4", "--resume", "--text", new, texts[1])
    assert set(ours["texts"]) == {"prose", "letters"}
    assert set(peer["texts"]) == {"prose", "letters", "new"}
    assert peer["texts"]["letters"] == old["texts"]["letters"]
    assert peer["texts"]["new"] == old["texts"]["prose"]
    lines = (tmp_path / "quality.md").read_text().splitlines()
    assert sum(cell.strip() != "" for cell in lines[4].split("|")) == 3 + 3  # rtn-3: not on new
    assert sum(cell.strip() != "" for cell in lines[5].split("|")) == 3 + 2 * 3


def test_a_text_that_nothing_was_measured_on_is_left_out(run: Any, tmp_path: Path) -> None:
    run("--only", "NF4")
    run("--only", "--text", tmp_path / "unread.txt", tmp_path / "letters.txt")
    head = (tmp_path / "quality.md").read_text().splitlines()[1]
    assert "letters: KL" in head
    assert "unread" not in head


def test_other_parameters_are_put_back(load: Load, source: Path, texts: list[Path]) -> None:
    def spoil(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
        yield "model.norm.weight", torch.full((128,), 3.0), 0
        for name, weight in weights.items():
            yield name, weight, 16 * weight.numel()

    quality = load("quality")
    bench = quality.Bench(source, quality.Request(text=texts[:1], tokens=200))
    spoilt, same = (
        bench.row(load("methods").Method(name, "16 bits", make), ["prose"])
        for name, make in {"spoilt": spoil, "same": load("methods").each(unchanged)}.items()
    )
    assert (spoilt["bits"], same["bits"]) == (16, 16)
    assert spoilt["texts"]["prose"]["kl"] > 0.1
    assert same["texts"]["prose"]["kl"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(SourceError, match=r"none left out model.layers.0.\S*weight; it must"):
        bench.row(load("methods").Method("none", "", lambda _: ()), [])
    made = load("methods").Method("odd", "", lambda _: [("b", torch.ones(1), 1)])
    with pytest.raises(SourceError, match="odd made 'b', which the model does not have"):
        bench.row(made, [])


def test_tasks_and_another_name(run: Any, load: Load, source: Path, tmp_path: Path) -> None:
    """Accuracy of an unchanged model is the original's; what is there is not asked again."""
    file = tmp_path / "quiz.jsonl"
    lines = [{"query": f"Q{i}", "choices": ["one", "two"], "gold": i % 2} for i in range(6)]
    file.write_text("\n".join(map(json.dumps, lines)))
    run("--only", "NF4")
    run("--only", "NF4", "--resume", "--tasks", file, "--limit", "5")
    (row,) = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert set(row["texts"]) == {"prose", "letters"}
    assert row["dtype"] in ("bfloat16", "float32")
    assert row["cpu_seconds"] > 0
    task = row["tasks"]["quiz"]
    assert task["questions"] == 5
    assert 5 * task["accuracy"] == pytest.approx(round(5 * task["accuracy"]))
    page = (tmp_path / "quality.md").read_text()
    assert "| method | variant | effective bits | quiz (5 questions) | 95 % |" in page
    assert f"| NF4 | g 64 | {row['bits']:.3f} | {100 * task['accuracy']:.1f} % |" in page

    run("--only", "--name", "other")  # nothing to measure: nothing is written
    assert not (tmp_path / "other.json").exists()
    quality = load("quality")
    bench = quality.Bench(source, quality.Request(tasks=[file], limit=5))
    same = load("methods").Method("same", "16 bits", load("methods").each(unchanged))
    found = bench.row(same, [], ["quiz"])["tasks"]["quiz"]
    assert found["accuracy"] == found["original_accuracy"] == task["original_accuracy"]
    assert found["same_choice"] == 1


def unchanged(weight: Tensor) -> tuple[Tensor, int]:
    return weight, 16 * weight.numel()


def test_checkpoint_of_another_model(load: Load, source: Path, tmp_path: Path) -> None:
    folder = packed(source, tmp_path / "packed", [])
    with pytest.raises(SourceError, match=r"packed: packs model.layers.0.\S*, which is no linear"):
        list(load("methods").checkpoint(folder).quantize({"other.weight": torch.zeros(2, 2)}))


def test_checkpoints_say_what_they_learnt_from(load: Load, source: Path, tmp_path: Path) -> None:
    folder = packed(source, tmp_path / "packed", [])
    path = folder / "precalib.json"
    manifest = json.loads(path.read_text())
    names = {
        ("random", False): ("precalib, random tokens", ""),
        ("self", False): ("precalib, own text", ""),
        ("self", True): ("precalib --feedback", ""),
        ("file", False): ("precalib, prose", "prose"),
        ("file", True): ("precalib --feedback, prose", "prose"),
    }
    for (text, feedback), expected in names.items():
        known = {"tokens": 9, "text": text, "feedback": feedback}
        manifest["job"]["activations"] = known | ({"file": "prose.txt"} if text == "file" else {})
        path.write_text(json.dumps(manifest))
        method = load("methods").checkpoint(folder)
        assert (method.name, method.calibration) == expected
        assert method.variant == "packed"


PEERS = """
import json, sys, pathlib, torch
from safetensors import safe_open
from safetensors.torch import save_file

if sys.argv[1] == "--list":
    row = {"method": "Half", "variant": "v", "calibrated": True, "note": ""}
    print(json.dumps([row, row | {"method": "Broken", "calibrated": False, "note": "odd"}]))
    sys.exit()
if sys.argv[3] == "Broken":
    sys.exit("first line\\nno such thing")
assert pathlib.Path(sys.argv[5]).exists()
target = pathlib.Path(sys.argv[2])
target.mkdir(parents=True)
bits = json.dumps({"a.weight": 12})
weights = {"a.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}
save_file(weights, target / "weights.safetensors", metadata={"stored_bits": bits})
"""


def test_peers_of_another_interpreter(load: Load, tmp_path: Path, texts: list[Path]) -> None:
    methods = load("methods")
    (tmp_path / "peers.py").write_text(PEERS)
    program = (sys.executable, str(tmp_path / "peers.py"))
    found = methods.outside(program, Path("source"), tmp_path / "work", texts)
    assert [(m.name, m.calibration, m.note) for m in found] == [
        ("Half, prose", "prose", ""),
        ("Half, letters", "letters", ""),
        ("Broken", "", "odd"),
    ]
    for _ in range(2):  # the second time from the folder
        made = {name: bits for name, _, bits in found[0].quantize({})}
        assert made == {"a.weight": 12, "norm.weight": 0}
        assert found[0].cpu_seconds(99) is None  # this program did not say
        (tmp_path / "peers.py").write_text("raise SystemExit('made twice')")
    (tmp_path / "peers.py").write_text(PEERS)
    with pytest.raises(SourceError, match="Broken v failed: no such thing"):
        list(found[2].quantize({}))
