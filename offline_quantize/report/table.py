"""The table of packed weights: its columns, what they mean, and the strip of positions."""

import dataclasses
from collections.abc import Callable, Sequence

from offline_quantize.report.contents import Weight
from offline_quantize.report.measure import Positions

STRIP_COLUMNS, STRIP_HEIGHT = 64, 16
BUSIEST = 0.01


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell.

    value: what to sort by; None to sort by the text.
    share: length of the bar behind the text, in percent.
    """

    text: str
    value: float | None = None
    share: int = 0


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: heading, meaning, and the cell of a weight."""

    name: str
    about: str
    cell: Callable[[Weight], Cell]
    words: bool = False


def columns(weights: Sequence[Weight]) -> list[Column]:
    """The columns that tell something about these weights."""
    largest = max(weight.error for weight in weights) or 1.0

    def error(weight: Weight) -> Cell:
        return Cell(f"{weight.error:.5f}", weight.error, round(100 * weight.error / largest))

    found = [
        Column("error", "‖W − Ŵ‖² / ‖W‖²; the bar is its share of the largest", error),
        _number(
            "bits", "effective bits per weight, all stored bytes counted", "bits_per_weight", ".3f"
        ),
        _number(
            "KL", "KL(before ‖ after) of 256-bin histograms of the weights, in nats", "kl", ".4f"
        ),
        _number("entropy before", "of that histogram before, in bits", "entropy_before", ".2f"),
        _number("entropy after", "of that histogram after, in bits", "entropy_after", ".2f"),
        Column("shape", "outputs × inputs", _shape),
    ]
    if len({weight.recipe for weight in weights}) > 1:
        recipe = Column("recipe", "how the weight was quantized", lambda w: Cell(w.recipe), True)
        found.insert(0, recipe)
    if any(weight.positions for weight in weights):
        found += [
            _number("salient", "share of salient weights", "salient_share", ".2%"),
            Column(
                "in busiest 1 %",
                "share of the salient weights that lies in the 1 % of input columns with the most "
                "of them; 1 % if none stands out, much more where a few inputs are special",
                _busiest,
            ),
        ]
    if any(weight.measures.salient_overflow for weight in weights):
        found.append(
            Column(
                "overflow",
                "share of weights above λ' that found no place among their group's salient ones "
                "and were quantized as non-salient ones",
                lambda w: Cell(f"{w.overflow_share:.2%}", w.overflow_share),
            )
        )
    return found


def strip(positions: Positions | None) -> str:
    """SVG path, 64 wide and 16 high, of the densest input column in each 64th of the columns.

    Full height is the densest of all, or four times the mean if that is more, so that chance
    looks flat.
    """
    if positions is None or not int(positions.columns.sum()):
        return ""
    counts = positions.columns.double()
    top = max(float(counts.max()), 4 * float(counts.mean()))
    parts = counts.tensor_split(min(STRIP_COLUMNS, len(counts)))
    heights = [round(STRIP_HEIGHT * float(part.max()) / top) for part in parts]
    width = STRIP_COLUMNS / len(parts)
    steps = (f"V{STRIP_HEIGHT - height}h{width:g}" for height in heights)
    return f"M0 {STRIP_HEIGHT}{''.join(steps)}V{STRIP_HEIGHT}z"


def _number(name: str, about: str, measure: str, form: str) -> Column:
    def cell(weight: Weight) -> Cell:
        value = float(getattr(weight.measures, measure))
        return Cell(format(value, form), value)

    return Column(name, about, cell)


def _shape(weight: Weight) -> Cell:
    rows, inputs = weight.shape
    return Cell(f"{rows:,} × {inputs:,}", rows * inputs)


def _busiest(weight: Weight) -> Cell:
    if weight.positions is None:
        return Cell("", -1.0)
    share = weight.positions.busiest(BUSIEST)
    return Cell(f"{share:.1%}", share)
