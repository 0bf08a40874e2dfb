"""The pictures of a report, drawn with matplotlib as SVG that takes its colours from the page.

Drawing uses stand-in colours, and the SVG's are replaced by the page's: one copy of a picture is
right on a light and on a dark background.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from offline_quantize.report.contents import Weight
from offline_quantize.report.evaluations import Evaluation
from offline_quantize.report.measure import Histogram

INK, NON_SALIENT, SALIENT = "#010101", "#020202", "#030303"
PAGE_COLOURS = {INK: "currentColor", NON_SALIENT: "var(--non-salient)", SALIENT: "var(--salient)"}
SALIENT_MAP = LinearSegmentedColormap.from_list("salient", [(0.9, 0.4, 0, 0), (0.9, 0.4, 0, 1)])
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
    "svg.hashsalt": "precalib",  # equal pictures have equal bytes
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "image.composite_image": False,
    **dict.fromkeys(
        ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK
    ),
    **{"grid.color": INK, "grid.alpha": 0.15},
}
NUMBER = FuncFormatter(lambda value, _: f"{value:g}")
MARKERS = "osD^v"


def error_map(weights: Sequence[Weight]) -> str:
    """Relative error by layer and kind; the mean where a kind has several weights in a layer."""
    kinds = list(dict.fromkeys(weight.kind for weight in weights))
    layers = sorted({weight.layer for weight in weights}, key=lambda layer: (layer < 0, layer))
    names = ["–" if layer < 0 else str(layer) for layer in layers]  # an output head has none
    sums = np.zeros((2, len(kinds), len(layers)))
    for weight in weights:
        size = math.prod(weight.shape)
        sums[:, kinds.index(weight.kind), layers.index(weight.layer)] += size * weight.error, size
    with np.errstate(invalid="ignore"):
        means = sums[0] / sums[1]
    masked: Any = np.ma  # it has no types
    errors = masked.array(means, mask=~(means > 0))  # no weight there, or one without error
    low, high = (errors.min(), errors.max()) if errors.count() else (1e-3, 1e-2)
    norm = LogNorm(low / 1.05, high * 1.05)
    longest = max(map(len, kinds))
    width = 1.8 + 0.08 * longest + max(0.2 * len(layers), 2.2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 0.9 + 0.3 * len(kinds)), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["viridis"].resampled(64)
        mesh = axes.pcolormesh(errors, norm=norm, cmap=colours, antialiased=False)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
        step = max(1, -(-len(layers) // 20))
        axes.set_xticks(np.arange(0, len(layers), step) + 0.5, names[::step])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer")
        bar = figure.colorbar(mesh, ax=axes, label="relative error", fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        bar.ax.yaxis.set_major_formatter(NUMBER)
        bar.ax.yaxis.set_minor_locator(NullLocator())
    return _svg(figure, "map", "Heat map of the relative error by layer and kind of weight")


def picture(name: str, weight: Weight, histogram: Histogram) -> str:
    """Histogram of a weight by class, and below it a map of where its salient weights are.

    name: begins the ids of the SVG; another one for each picture of a page.
    """
    where = weight.positions
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.8 if where is None else 4.4), layout="constrained")
        if where is None:
            _draw_histogram(figure.add_subplot(), histogram)
        else:
            upper, lower = figure.subplots(2, 1, height_ratios=(1.6, 1))
            _draw_histogram(upper, histogram)
            _draw_positions(lower, where.blocks.numpy(), weight.shape)
    below = "" if where is None else ", and a map of its salient weights"
    return _svg(figure, name, f"Histogram of {weight.module}{below}")


def curve(evaluations: Sequence[Evaluation]) -> str:
    """Effective bits against KL, a line for each family of recipes on a text.

    The checkpoint that the report is about has a ring.

    Empty where no KL is above zero: an estimate can be below.
    """
    series: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        text = evaluation.result.text
        if text is not None and text.kl > 0:
            family = evaluation.result.recipe.partition("-")[0]
            series.setdefault(f"{family}: {evaluation.measured_on}", []).append(evaluation)
    if not series:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6 + 0.2 * len(series)), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(sorted(series.items())):
            _draw_series(axes, name, sorted(points, key=lambda e: e.result.bits_per_weight), i)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(NUMBER)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.15, y=0.15)
        axes.grid()
        axes.set_xlabel("effective bits per weight")
        axes.set_ylabel("KL(original ‖ quantized), nats per token")
        figure.legend(loc="outside lower left", fontsize=9)
    return _svg(figure, "curve", "Effective bits per weight against KL divergence")


def _draw_histogram(axes: Axes, histogram: Histogram) -> None:
    edges = np.linspace(-histogram.largest, histogram.largest, len(histogram.non_salient) + 1)
    weights = int(histogram.non_salient.sum() + histogram.salient.sum())
    floor = 0.5 / weights
    filled: dict[str, Any] = {"fill": True, "alpha": 0.3}
    line: dict[str, Any] = {"linewidth": 1.2}
    series: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
        ("original, non-salient", NON_SALIENT, histogram.original_non_salient, filled),
        ("original, salient", SALIENT, histogram.original_salient, filled),
        ("quantized, non-salient", NON_SALIENT, histogram.non_salient, line),
        ("quantized, salient", SALIENT, histogram.salient, line),
    )
    for label, colour, counts, look in series:
        if counts is not None and counts.any():
            share = np.maximum(counts.numpy() / weights, floor)
            axes.stairs(share, edges, baseline=floor, color=colour, label=label, **look)
    axes.set_yscale("log")
    axes.set_ylim(floor, 2)
    axes.yaxis.set_major_formatter(NUMBER)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("weight")
    axes.set_ylabel("share per bin")
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.43, 1)}
    axes.legend(ncols=2, fontsize=9, handlelength=1.5, columnspacing=1, **place)


def _draw_positions(axes: Axes, blocks: np.ndarray, shape: tuple[int, int]) -> None:
    # four times the mean is full colour, so that mere chance stays pale
    top = max(blocks.max(), 4 * blocks.mean()) or 1
    extent = (0, shape[1], shape[0], 0)
    axes.imshow(
        blocks,
        cmap=SALIENT_MAP,
        vmin=0,
        vmax=top,
        extent=extent,
        aspect="auto",
        interpolation="none",
    )
    axes.spines[:].set_visible(True)
    axes.set_xlabel("input column")
    axes.set_ylabel("output row")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _draw_series(axes: Axes, name: str, points: Sequence[Evaluation], index: int) -> None:
    texts = [point.result.text for point in points if point.result.text is not None]
    kl = np.array([text.kl for text in texts])
    spread = np.abs(np.array([text.kl_interval for text in texts]).T - kl)
    bits = [point.result.bits_per_weight for point in points]
    look: dict[str, Any] = {
        "marker": MARKERS[index % len(MARKERS)],
        "color": (NON_SALIENT, SALIENT, INK)[index % 3],
    }
    axes.errorbar(bits, kl, spread, label=name, capsize=2, linewidth=1.4, markersize=5, **look)
    for point, x, y in zip(points, bits, kl, strict=True):
        place: dict[str, Any] = {"xytext": (7, 4), "textcoords": "offset points"}
        axes.annotate(point.result.recipe, (x, y), fontsize=9, **place)
        if point.own:
            axes.plot(x, y, "o", markersize=13, markerfacecolor="none", color=INK)


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element for a page with others; `name` keeps its ids apart."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    text = re.sub(r' d="[^"]*"', lambda path: _shorter(path[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _shorter(path: str) -> str:
    """A path with a tenth of a point as its unit, which is finer than a screen's."""
    path = re.sub(r"(\.\d)\d+", r"\1", path.replace("\n", ""))
    return re.sub(r"([A-Za-z]) ", r"\1", path)
