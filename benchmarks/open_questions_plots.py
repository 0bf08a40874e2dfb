"""Plots of the rows of open_questions.py, on white, so that dark pages do not hide their text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_report import KL_LABEL, kl_axes

Row = Mapping[str, Any]
SIZE, DPI = 6, 130
RECIPES = ("paper-3", "paper-4", "balanced-2", "balanced-3", "balanced-4")


def plots(rows: Sequence[Row], out: Path) -> None:
    """Draw what there are rows for."""
    import matplotlib

    matplotlib.use("Agg")
    for question, draw, name in (
        ("alpha", frontier, "open-questions-alpha.png"),
        ("shape", shapes, "open-questions-shape.png"),
        ("rules", bars, "open-questions-rules.png"),
        ("inputs", bars, "open-questions-inputs.png"),
    ):
        own = [row for row in rows if row["question"] == question]
        if own:
            draw(own, out / name)


def frontier(rows: Sequence[Row], path: Path) -> None:
    """Effective bits against KL, a line per recipe along its shares, a panel per model."""
    from matplotlib import pyplot

    models = _models(rows)
    figure, panels = pyplot.subplots(
        1,
        len(models),
        figsize=(1 + SIZE * len(models), SIZE),
        dpi=DPI,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    colors = {name: pyplot.get_cmap("tab10")(i) for i, name in enumerate(RECIPES)}
    for model, axes in zip(models, panels[0], strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            own.sort(key=lambda row: row["bits"])
            name, _, with_inputs = method.partition(", ")
            axes.plot(
                [row["bits"] for row in own],
                [row["kl"] for row in own],
                label=method,
                marker="s" if with_inputs else "o",
                linestyle="--" if with_inputs else "-",
                color=colors[name],
            )
            for row in own:
                axes.annotate(
                    f"{100 * row['share']:.2g}",
                    (row["bits"], row["kl"]),
                    textcoords="offset points",
                    xytext=(3, 4),
                    fontsize=6,
                )
        kl_axes(axes, model, "effective bits per weight; at the points: α in %")
    panels[0][0].set_ylabel(KL_LABEL)
    panels[0][-1].legend(fontsize="small")
    _save(figure, path)


def shapes(rows: Sequence[Row], path: Path) -> None:
    """Kurtosis of a weight against the number of salient weights that pays best."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(1 + 2 * SIZE, SIZE), dpi=DPI, sharey=True)
    for column, title in (
        ("best", "error of the weight"),
        ("weighted_best", "error of the outputs"),
    ):
        axes = panels[int(column != "best")]
        for index, model in enumerate(_models(rows)):
            for kind_index, kind in enumerate(sorted({row["kind"] for row in rows})):
                own = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
                axes.scatter(
                    [max(row["kurtosis"], 0.01) for row in own],
                    [100 * row[column] / 128 for row in own],
                    label=kind if index == 0 else None,
                    marker="os^"[index % 3],
                    color=pyplot.get_cmap("tab10")(kind_index),
                    alpha=0.7,
                )
        axes.set_xscale("log")
        axes.set_xlabel("excess kurtosis within groups")
        axes.set_title(f"{title}; " + ", ".join(
            f"{'●■▲'[i % 3]} {model}" for i, model in enumerate(_models(rows))
        ), fontsize="medium")  # fmt: skip
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of salient weights that pays best, %")
    panels[1].legend(fontsize="small")
    _save(figure, path)


def bars(rows: Sequence[Row], path: Path) -> None:
    """KL of each row as a bar, a panel per model."""
    from matplotlib import pyplot

    models = _models(rows)
    figure, panels = pyplot.subplots(
        1,
        len(models),
        figsize=(1 + SIZE * len(models), 4),
        dpi=DPI,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for model, axes in zip(models, panels[0], strict=True):
        own = [row for row in rows if row["model"] == model][::-1]
        names = [f"{row['variant']}, {row['method']}" for row in own]
        drawn = axes.barh(names, [row["kl"] for row in own])
        axes.bar_label(drawn, [f"{row['kl']:.3f}" for row in own], padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.set_xlabel(KL_LABEL)
        axes.set_title(model)
    _save(figure, path)


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
