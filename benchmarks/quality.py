"""Quality along the curve: true bits against KL, for every recipe and for other data-free methods.

    python benchmarks/quality.py SOURCE --text FILE --out docs

writes quality.json, quality.png, and the table in quality.md between its two markers. Recipes go
through the real encoder and back; in every method only the linear weights of the decoder change.
With --only WORD … the rows of all other methods stay as they are in quality.json. SINQ is measured
where the package `sinq` can be imported.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import Peer, peers
from torch import Tensor

from offline_quantize.encode import encode
from offline_quantize.evaluate import Original, Request
from offline_quantize.evaluation import compare, text_windows
from offline_quantize.files import read_json, write_json
from offline_quantize.models import load_original, load_tokenizer
from offline_quantize.plan import Options, make_plan
from offline_quantize.recipes import RECIPES, Recipe
from offline_quantize.source import open_checkpoint
from offline_quantize.tensorfile import read_tensor
from precalib_kernels.errors import PrecalibError, SourceError
from precalib_kernels.reference import dequantize

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
OURS = {"balanced": "precalib balanced", "paper": "precalib paper", "rtn": "precalib rtn"}


def main() -> None:
    """Measure all methods and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    parser.add_argument("--only", nargs="*", default=[], help="methods whose names contain a word")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        run(arguments)
    except PrecalibError as error:
        sys.exit(f"quality: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Measure what is not measured yet; table and plot after every row."""
    checkpoint = open_checkpoint(arguments.source)
    plan = make_plan(checkpoint, Options("rtn-4", {}, [], ()))
    request = Request(text=arguments.text, tokens=arguments.tokens)
    windows = text_windows(load_tokenizer(arguments.source), arguments.text, arguments.tokens)
    reference = Original(checkpoint, request).reference(windows)
    model = load_original(arguments.source, request.dtype, request.device)
    modules = dict(model.named_modules())
    weights: dict[str, Tensor] = {}
    for file, entries in checkpoint.shards.items():
        for name, entry in entries.items():
            if name in plan.packings:
                if name.removesuffix(".weight") not in modules:
                    raise SourceError(f"{name}: the model of transformers has no such module")
                weights[name] = read_tensor(arguments.source / file, name, entry)
    total = sum(weight.numel() for weight in weights.values())

    path = arguments.out / "quality.json"
    rows = read_json(path, SourceError, "remove it")["rows"] if arguments.only else []
    for (method, variant), peer in methods().items():
        if arguments.only and not any(word in f"{method} {variant}" for word in arguments.only):
            continue
        rows = [row for row in rows if (row["method"], row["variant"]) != (method, variant)]
        stored, start = 0, time.perf_counter()
        with torch.inference_mode():
            for name, weight in weights.items():
                values, bits = peer(weight.float())
                modules[name.removesuffix(".weight")].weight.data.copy_(values)
                stored += bits
        seconds = time.perf_counter() - start
        measured = compare(reference, model, windows).summary()
        row = {"method": method, "variant": variant, "bits": stored / total, "seconds": seconds}
        rows.append(row | measured)
        print(f"{method}, {variant}: {row['bits']:.3f} bits, KL {measured['kl']:.4f}", flush=True)
        rows.sort(key=lambda row: (_rank(row["method"]), row["bits"]))
        about = {"text": [file.name for file in arguments.text], "source": arguments.source.name}
        write_json(path, about | {"tokens": measured["tokens"], "rows": rows})
    insert_table(table(rows), arguments.out / "quality.md")
    plot(rows, arguments.out / "quality.png")


def methods() -> Mapping[tuple[str, str], Peer]:
    """Recipes and peers, by method and variant."""
    found: dict[tuple[str, str], Peer] = {}
    for name, recipe in RECIPES.items():
        found[OURS.get(name.split("-")[0], f"precalib {name}"), name] = _through_the_format(recipe)
    return found | dict(peers())


def _through_the_format(recipe: Recipe) -> Peer:
    """A recipe as a function of a weight: packed by the real encoder, and unpacked."""

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        tensors = encode(weight.bfloat16(), recipe, "benchmark").tensors
        stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
        return dequantize(tensors, recipe.layout, weight.shape[1]), stored

    return quantize


def best_peer(bits: float, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """KL of the best method at so many bits, log-linear between a method's own points.

    None outside the span of every method.
    """
    found = []
    for method in {row["method"] for row in rows}:
        points = sorted((row["bits"], row["kl"]) for row in rows if row["method"] == method)
        for (low, kl_low), (high, kl_high) in itertools.pairwise(points):
            if low <= bits <= high and low < high:
                share = (bits - low) / (high - low)
                found.append(kl_low ** (1 - share) * kl_high**share)
    return min(found, default=None)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    others = [row for row in rows if not row["method"].startswith("precalib")]
    lines = [
        "| method | variant | true bits | KL | 95 % | KL 99 % | top-1 agreement | perplexity "
        "| × best peer |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        f"| original | bfloat16 | 16 | 0 | | | | {rows[0]['original_perplexity']:.2f} | |",
    ]
    for row in rows:
        low, high = row["kl_interval"]
        peer = None if row in others else best_peer(row["bits"], others)
        ratio = "" if peer is None else f"{row['kl'] / peer:.2f}"
        lines.append(
            f"| {row['method']} | {row['variant']} | {row['bits']:.3f} | {row['kl']:.4f} "
            f"| {low:.4f}–{high:.4f} | {row['kl_99']:.2f} | {100 * row['agreement']:.1f} % "
            f"| {row['perplexity']:.2f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def insert_table(text: str, page: Path) -> None:
    """Put the table where the page has its markers; a page that does not exist is made."""
    written = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = written.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SourceError(f"{page}: has no lines '{BEGIN}' and '{END}' around its table")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits against KL on a logarithmic axis, one line per method, ours drawn heavier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 5.5), dpi=150)
    for index, method in enumerate(sorted({row["method"] for row in rows}, key=_rank)):
        points = sorted((row["bits"], row["kl"]) for row in rows if row["method"] == method)
        ours = method.startswith("precalib")
        axes.plot(
            *zip(*points, strict=True),
            label=method,
            marker="o" if ours else "osD^v<>"[index % 7],
            linestyle="-" if ours else "--",
            linewidth=2.4 if method == OURS["balanced"] else 1.3,
            markersize=7 if ours else 5,
            color=pyplot.get_cmap("tab10")(index % 10),
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("true bits per weight")
    axes.set_ylabel("KL(original ‖ quantized), nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _rank(method: str) -> tuple[bool, str]:
    return not method.startswith("precalib"), method


if __name__ == "__main__":
    main()
