"""The recipes, as data: how each weight is laid out and how its codes are found.

To add a recipe, add an entry to RECIPES. Its `layout` says what is stored, and any layout that
`precalib_kernels.format.layout` accepts can be encoded; the other fields of `Recipe` say how.
Nothing else need change: the command line, --dry-run, the manifest and the tests that run through
every recipe take it from there, and backends look at the layout alone (`precalib doctor`). A
codebook of its own goes to `precalib_kernels/format/codebooks.py`; `lloyd.py` computes them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from precalib_kernels.errors import FormatError, RecipeError
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import COLUMN_UNIT, MAX_SALIENT_COUNT, Layout

JSON_NAMES = {"sinkhorn_iterations": "balance"}  # fields that files call by another name


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a weight is quantized.

    about:    a few words for people, without the numbers of the layout.
    layout:   how the result is stored; its salient_count is the most a group can have.
    rule:     what makes a weight salient. "group": the layout's salient_count largest of each
              group (one λ' per group). "tensor": all above one λ' per tensor (the paper).
    alpha:    share of salient weights the rule aims at; 0 for none.
    clip:     share of the non-salient range that a min-max grid covers.
    sinkhorn_iterations: that find the column scale, if the layout has one.
    """

    about: str
    layout: Layout
    rule: Literal["group", "tensor"] = "group"
    alpha: float = 0.0
    clip: float = 1.0
    sinkhorn_iterations: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise RecipeError(f"alpha is {self.alpha}, it must be at least 0 and below 1")
        if not 0 < self.clip <= 1:
            raise RecipeError(f"clip is {self.clip}, it must be above 0 and at most 1")
        if self.clip != 1 and not self.layout.uniform:
            raise RecipeError("clip applies to min-max grids; this recipe fits non-uniform levels")

    def describe(self) -> str:
        """One line for people."""
        layout, most = self.layout, "up to " if self.rule == "tensor" else ""
        count = f"{most}{layout.salient_count} of {layout.group_size} salient"
        salient = f", {count} at {layout.salient_bits} bits" if layout.salient_count else ""
        return f"{layout.bits} bits{salient}: {self.about}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for the manifest and for comparing runs."""
        fields = {json: getattr(self, name) for json, name in _json_fields().items()}
        return fields | {"layout": self.layout.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Recipe":
        """Inverse of `to_dict`. Raises FormatError or RecipeError for anything else."""
        names = _json_fields()
        try:
            known = {names[json]: value for json, value in {**fields}.items()}
            return cls(**{**known, "layout": Layout.from_dict(fields["layout"])})
        except (KeyError, TypeError) as error:
            raise FormatError(f"recipe {fields}: {error}") from error


def _json_fields() -> dict[str, str]:
    """Fields of a recipe, by the names they have in files."""
    return {JSON_NAMES.get(f.name, f.name): f.name for f in dataclasses.fields(Recipe)}


def _balanced(bits: int, salient_count: int, salient_bits: int) -> Recipe:
    layout = Layout(
        bits=bits,
        group_size=128,
        codebook=TRELLIS_CODEBOOKS[bits],
        trellis=True,
        scale="log8",
        salient_count=salient_count,
        salient_bits=salient_bits,
        salient_grid="row",
        column_scale=True,
    )
    return Recipe("trellis, column scale", layout, alpha=salient_count / 128, sinkhorn_iterations=4)


RECIPES: Mapping[str, Recipe] = {
    "balanced-4": _balanced(4, salient_count=2, salient_bits=8),
    "balanced-3": _balanced(3, salient_count=4, salient_bits=7),
    "balanced-5": _balanced(5, salient_count=2, salient_bits=8),
    "balanced-2": _balanced(2, salient_count=4, salient_bits=6),
    "paper-4": Recipe(
        "arXiv 2501.09107: 8 % salient by one λ' per tensor, min-max grids",
        Layout(bits=4, group_size=128, salient_count=16, salient_bits=4, salient_grid="min-max"),
        rule="tensor",
        alpha=0.08,
    ),
    "paper-3": Recipe(
        "arXiv 2501.09107: 8 % salient, non-salient range clipped to 95 %",
        Layout(bits=3, group_size=128, salient_count=16, salient_bits=3, salient_grid="min-max"),
        rule="tensor",
        alpha=0.08,
        clip=0.95,
    ),
    "rtn-4": Recipe("round to nearest, for comparison", Layout(bits=4, group_size=128)),
    "rtn-3": Recipe("round to nearest, for comparison", Layout(bits=3, group_size=128)),
}
DEFAULT = "balanced-4"


def find(name: str) -> Recipe:
    """The recipe of that name. Raises RecipeError that lists the names there are."""
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe '{name}'; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def for_head(name: str) -> tuple[str, Recipe]:
    """Label and recipe of that name for an output head or embeddings: without a column scale.

    The spread of a head's columns does not tell how large its inputs are, and even columns hide
    from the salient weights the few columns that all rows have in common (docs/method.md).
    """
    recipe = find(name)
    if not recipe.layout.column_scale:
        return name, recipe
    layout = dataclasses.replace(recipe.layout, column_scale=False)
    about = recipe.about.replace("column scale", "no column scale")
    head = dataclasses.replace(recipe, about=about, layout=layout, sinkhorn_iterations=0)
    return f"{name} (head)", head


def adjust(
    recipe: Recipe,
    bits: int | None = None,
    group_size: int | None = None,
    alpha: float | None = None,
    salient_bits: int | None = None,
    clip: float | None = None,
) -> Recipe:
    """The recipe with the user's options in place of its own values; None leaves a value.

    A share alpha (0.05 for 5 %) becomes round(alpha * group_size) salient weights per group; a
    rule per tensor gets twice as many places (32 at most), since its counts are uneven.

    Raises RecipeError for values the format or the recipe does not have.
    """
    layout = recipe.layout
    _check_values(layout, bits, group_size, alpha, salient_bits, clip)
    changes: dict[str, Any] = {}
    if bits is not None and bits != layout.bits:
        changes["bits"] = bits
        if layout.codebook is not None:
            changes["codebook"] = TRELLIS_CODEBOOKS.get(bits)
        if layout.salient_bits == layout.bits:
            changes["salient_bits"] = bits
    if group_size is not None:
        changes["group_size"] = group_size
    if salient_bits is not None:
        changes["salient_bits"] = salient_bits
    share = recipe.alpha if alpha is None else alpha
    size = changes.get("group_size", layout.group_size)
    if (share, size) != (recipe.alpha, layout.group_size):
        places = round(share * size)
        if recipe.rule == "tensor":
            places = min(2 * places, MAX_SALIENT_COUNT)
        if places > MAX_SALIENT_COUNT:
            raise RecipeError(
                f"a share of {share:g} salient weights (--alpha) makes {places} in a group of "
                f"{size}, and a group has at most {MAX_SALIENT_COUNT}; "
                f"give at most --alpha {MAX_SALIENT_COUNT / size:.3g}"
            )
        changes["salient_count"] = places
    try:
        adjusted = dataclasses.replace(layout, **changes)
    except FormatError as error:
        raise RecipeError(f"these options do not fit together: {error}") from error
    return dataclasses.replace(
        recipe, layout=adjusted, alpha=share, clip=recipe.clip if clip is None else clip
    )


def _check_values(
    layout: Layout,
    bits: int | None,
    group_size: int | None,
    alpha: float | None,
    salient_bits: int | None,
    clip: float | None,
) -> None:
    """Raise RecipeError for a value that is wrong whatever the others are."""
    base = layout.bits if bits is None else bits
    unit = COLUMN_UNIT
    size = unit if group_size is None else group_size
    for option, value, fits, allowed in (
        ("--bits", bits, bits in TRELLIS_CODEBOOKS, "2, 3, 4 or 5"),
        ("--group-size", group_size, size > 0 == size % unit, f"a positive multiple of {unit}"),
        ("--alpha", alpha, 0 <= (alpha or 0) < 1, "a share from 0 to below 1, as 0.05 for 5 %"),
        ("--salient-bits", salient_bits, base <= (salient_bits or base) <= 8, f"{base} to 8"),
        ("--clip", clip, 0 < (1 if clip is None else clip) <= 1, "a share above 0 and up to 1"),
    ):
        if value is not None and not fits:
            raise RecipeError(f"{option} {value}: give {allowed}")
    if clip not in (None, 1) and not layout.uniform:
        raise RecipeError(
            f"--clip {clip}: this recipe fits a codebook, and --clip applies to min-max grids; "
            "leave it out or take another --recipe"
        )
