"""Are the GPU kernels right, and how fast are they? One command on a bare CUDA machine.

    python benchmarks/gpu/acceptance.py --out DIRECTORY

Needs torch, Triton and pytest; no vLLM and no network. It runs the tests of the kernels on the GPU,
times Llama-3-8B's layers beside torch's bfloat16 and 4-bit products, experts and embeddings beside
torch's in bfloat16, looks for faster blocks, and writes `results.json`, `results.md` and
`table.txt`, entries for `launch_configs.TABLE`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

import experts  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from cost_model import LAYOUTS, SHAPES  # noqa: E402
from torch import Tensor  # noqa: E402

from precalib_kernels import ops  # noqa: E402
from precalib_kernels.backends.triton import op  # noqa: E402
from precalib_kernels.backends.triton.launch_configs import TABLE, Blocks, blocks_for  # noqa: E402
from precalib_kernels.backends.triton.memory_layout import triton_layout  # noqa: E402
from precalib_kernels.format.layout import Layout  # noqa: E402

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUNDS = 5
TUNED = ("balanced-4", "balanced-3", "paper-4")


def environment() -> dict[str, Any]:
    """What was measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "cache_mib": properties.L2_cache_size / 2**20,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def check(out: Path, jobs: int, seconds: float) -> dict[str, Any]:
    """Runs the kernels' tests on this GPU; counts, and the names and texts of failures."""
    kinds = ("", "_grouped", "_gather")
    suites = [*(f"interpreted{kind}_suite.py" for kind in kinds), "test_op.py"]
    report = out / "tests.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
        f"--junitxml={report}", *(["-n", str(jobs)] if jobs > 1 else []),
        *(str(ROOT / "tests" / "kernels" / "backends" / "triton" / name) for name in suites),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, timeout=seconds,
            capture_output=True, text=True,
        )  # fmt: skip
        (out / "tests.log").write_text(done.stdout + done.stderr)
    except subprocess.TimeoutExpired as error:
        (out / "tests.log").write_bytes(error.stdout or b"")
        return {"finished": False}
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = {}
    for case in cases:
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            failures[case.get("name")] = (bad[0].get("message") or "")[:300]
        skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
    return {"finished": True, **counts, "failures": failures}


def compile_entry(name: str, m: int, blocks: Blocks | None) -> None:
    """One kernel into Triton's cache, in a process of its own."""
    arrays = measure.packed_arrays(LAYOUTS[name], 256, 512)
    x = torch.randn(m, 512, dtype=torch.bfloat16, device="cuda")
    if blocks is None:
        op.gpu_linear(x, arrays, None, [256], LAYOUTS[name].to_text())
    else:
        named = dict(zip(ops.array_order(LAYOUTS[name]), arrays, strict=True))
        for split in (0, 1000):  # without and with a split of K
            entry = dataclasses.replace(blocks, programs_per_sm=split)
            op.gemm(x, named, None, LAYOUTS[name], [256], entry)
    torch.cuda.synchronize()


def compiled(entries: Sequence[tuple[str, int, Blocks | None]], jobs: int) -> set[int]:
    """Compiles entries side by side; the indices of those that this GPU can run."""
    context = multiprocessing.get_context("spawn")
    good = set()
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        waiting = {pool.submit(compile_entry, *entry): i for i, entry in enumerate(entries)}
        for future in concurrent.futures.as_completed(waiting):
            error = future.exception()
            if error is None:
                good.add(waiting[future])
            else:
                entry = entries[waiting[future]]
                print(f"not run: {entry}: {type(error).__name__} {str(error)[:200]}", flush=True)
    return good


def by_panels(layout: Layout, rows: int, x: Tensor, arrays: list[Tensor]) -> Tensor:
    """The product by dequantized panels, whatever M is."""
    named = dict(zip(ops.array_order(layout), arrays, strict=True))
    return op.by_panels(x, named, None, layout, [rows])


def timings(
    names: list[str], batches: list[int], vllm_kernel: Path | None
) -> Iterator[dict[str, Any]]:
    """A row per shape and M: microseconds and ratios to bfloat16."""
    for shape, (rows, columns) in SHAPES.items():
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        dense = measure.cold_copies([weight])
        packed = {
            name: measure.cold_copies(measure.packed_arrays(LAYOUTS[name], rows, columns))
            for name in names
        }
        for m in batches:
            x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
            calls: dict[str, list[Callable[[], Any]]] = {
                "bf16": [functools.partial(torch.nn.functional.linear, x, w) for (w,) in dense]
            }
            try:
                calls["torch int4"] = measure.int4_calls(x, rows, columns)
            except (RuntimeError, AttributeError) as error:
                print(f"torch's 4-bit product is left out: {str(error)[:100]}", flush=True)
            if vllm_kernel is not None:
                calls["vLLM triton_w4a16"] = measure.vllm_calls(vllm_kernel, x, rows, columns)
            for name in names:
                text = LAYOUTS[name].to_text()
                calls[name] = [
                    functools.partial(op.gpu_linear, x, arrays, None, [rows], text)
                    for arrays in packed[name]
                ]
            if 16 <= m <= 256:  # is the table's last entry where panels begin to be faster?
                calls[f"{names[0]} by panels"] = [
                    functools.partial(by_panels, LAYOUTS[names[0]], rows, x, arrays)
                    for arrays in packed[names[0]]
                ]
            times = measure.interleaved(calls, ROUNDS)
            yield {
                "shape": shape, "outputs": rows, "inputs": columns, "m": m,
                "microseconds": {n: round(1e3 * times.median(n), 2) for n in calls},
                "ratio": {n: round(times.ratio(n, "bf16"), 4) for n in calls if n != "bf16"},
            }  # fmt: skip
        del packed, dense
        torch.cuda.empty_cache()


def candidates(most: int) -> list[Blocks]:
    """Blocks worth trying for up to `most` rows of x."""
    cuts = [(64, 2), (64, 4), (128, 4), (128, 8)][: 3 if most <= 16 else 4]
    stages = (3, 4) if most <= 16 else (2, 3)
    programs_per_sm = (
        (4, 6, 8, 12, 16) if most <= 8 else (2, 3, 4, 6, 8) if most <= 16 else (1, 2, 3, 4)
    )
    widths = (32, 64) if most == 64 else (most,)
    return [
        Blocks(rows, width, warps, stage, wave)
        for width, (rows, warps), stage, wave in itertools.product(
            widths, cuts, stages, programs_per_sm
        )
        if not (width == 64 and (rows, warps) == (64, 2))
    ]


def tune(names: list[str], jobs: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The best blocks of every entry of the table, over two shapes, by geometric mean."""
    family, shapes = op.family(), [SHAPES["o"], SHAPES["gate_up"]]
    cases = list(itertools.product(names, TABLE[family]))
    kinds = [
        (name, most, blocks)
        for name, most in cases
        for blocks in sorted(
            {dataclasses.replace(b, programs_per_sm=0) for b in candidates(most)}, key=str
        )
    ]
    good = {kinds[i] for i in compiled(kinds, jobs)}
    print(f"{deadline - time.monotonic():.0f} s left, {len(good)} of {len(kinds)} run", flush=True)
    for name, most in cases:
        layout = LAYOUTS[name]
        if time.monotonic() > deadline:
            print(f"tune: no time left for {name}, M = {most}", flush=True)
            continue
        every = [
            b
            for b in candidates(most)
            if (name, most, dataclasses.replace(b, programs_per_sm=0)) in good
        ]
        now = blocks_for(family, most, triton_layout(layout).step)
        assert now, f"the table has no entry for M = {most}"
        logs = dict.fromkeys([*every, now], 0.0)
        m = 1 if most == 8 else min(most, 128)
        for rows, columns in shapes:
            copies = measure.cold_copies(measure.packed_arrays(layout, rows, columns))
            named = [dict(zip(ops.array_order(layout), c, strict=True)) for c in copies]
            x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
            calls = {
                str(blocks): [
                    functools.partial(op.gemm, x, c, None, layout, [rows], blocks) for c in named
                ]
                for blocks in logs
            }
            times = measure.interleaved(calls, 3)
            for blocks in logs:
                logs[blocks] += math.log(times.median(str(blocks)))
        ranked = sorted(logs, key=lambda blocks: logs[blocks])
        ratios = [
            [str(b), round(math.exp((logs[b] - logs[now]) / len(shapes)), 4)] for b in ranked[:8]
        ]
        yield {
            "layout": name, "most": most, "m": m, "today": str(now), "ranked": ratios,
            "best": ranked[0],
        }  # fmt: skip


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The results for people."""
    about = results["environment"]
    yield f"# {about['card']}, torch {about['torch']}, Triton {about['triton']}\n"
    yield f"Tests: {json.dumps(results.get('tests'))}\n"
    yield "Time over torch's bfloat16 product, weights outside the cache, medians of interleaved"
    yield f"rounds ({ROUNDS}).\n"
    if rows := results.get("times"):
        names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
        yield "| layer | M | bf16, µs | " + " | ".join(names) + " |"
        yield "|--|--:|--:|" + "--:|" * len(names)
        for row in rows:
            ratios = " | ".join(f"{row['ratio'].get(name, math.nan):.2f}" for name in names)
            cells = f"{row['shape']} {row['outputs']} × {row['inputs']} | {row['m']}"
            yield f"| {cells} | {row['microseconds']['bf16']:.1f} | {ratios} |"
        yield ""
    if rows := results.get("experts"):
        yield "Weights may be in the cache: experts that a product does not need are not read.\n"
        yield from experts.markdown(rows)
        yield ""
    for row in results.get("tuned", []):
        yield f"- {row['layout']}, M ≤ {row['most']}, today {row['today']}: {row['ranked']}"


def main() -> None:
    """Command line; leaves with a sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", default=["test", "time", "experts", "tune"])
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--tune", nargs="+", choices=list(LAYOUTS), default=list(TUNED))
    parser.add_argument("--seconds", type=float, default=420, help="time for everything")
    parser.add_argument("--vllm-kernel", type=Path, help="vLLM's file triton_w4a16.py, as a peer")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "acceptance: this machine has no GPU that torch can use\n")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline: float = time.monotonic() + options.seconds
    results: dict[str, Any] = {"environment": environment()}

    def save() -> None:
        lines = [f"{row['most']}: {row['best']},\n" for row in results.get("tuned", [])]
        (options.out / "table.txt").write_text("".join(lines))
        (options.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
        (options.out / "results.md").write_text("\n".join(markdown(results)) + "\n")

    def left() -> float:
        return deadline - time.monotonic()

    print(results["environment"], flush=True)
    if "test" in options.steps:
        results["tests"] = check(options.out, options.jobs, 0.6 * left())
        print(f"{left():.0f} s left", json.dumps(results["tests"])[:3000], flush=True)
        save()
    if "experts" in options.steps:
        results["experts"] = []
        names = [name for name in TUNED if name in options.layout]
        for times in (experts.expert_times, experts.embedding_times):
            for row in itertools.takewhile(lambda _: left() > 0, times(names, ROUNDS)):
                results["experts"].append(row)
                save()
        print(f"{left():.0f} s left, experts and embeddings timed", flush=True)
    if "time" in options.steps:
        entries = [
            (name, m, blocks_for(op.family(), m, triton_layout(LAYOUTS[name]).step))
            for name in options.layout
            for m in (*TABLE[op.family()], 10**3)
        ]
        bad = {entries[i][0] for i in range(len(entries))} - {
            entries[i][0] for i in compiled(entries, options.jobs)
        }
        print(f"{left():.0f} s left, compiled", flush=True)
        results["times"] = []
        good = [name for name in options.layout if name not in bad]
        rows = timings(good, options.batches, options.vllm_kernel)
        for row in itertools.takewhile(lambda _: left() > 0, rows):
            results["times"].append(row)
            save()
        print(f"{left():.0f} s left, timed", flush=True)
    if "tune" in options.steps:
        results["tuned"] = []
        for row in tune(options.tune, options.jobs, deadline):
            results["tuned"].append(row)
            save()
    save()
    print("\n".join(markdown(results)))


if __name__ == "__main__":
    main()
