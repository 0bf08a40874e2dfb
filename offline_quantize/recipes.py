"""The recipes, as data: how each weight is laid out and how its codes are found."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from precalib_kernels.errors import FormatError, RecipeError
from precalib_kernels.layout import MAX_SALIENT_COUNT, Layout

# Levels for the trellis by bits, ascending; `offline_quantize.levels` computes them.
_HALVES = {
    2: (11, 35, 60, 96),
    3: (5, 18, 29, 43, 57, 73, 91, 114),
    4: (3, 9, 16, 22, 28, 35, 40, 48, 55, 63, 71, 79, 88, 97, 109, 123),
}
LEVELS = {bits: (*(-x for x in reversed(half)), *half) for bits, half in _HALVES.items()}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a weight is quantized.

    about:    one line for people.
    layout:   how the result is stored; its salient_count is the most a group can have.
    rule:     what makes a weight salient. "group": the layout's salient_count largest of each
              group (one λ' per group). "tensor": all above one λ' per tensor (the paper).
    alpha:    share of salient weights the rule aims at; 0 for none.
    clip:     share of the non-salient range that a min-max grid covers.
    balance:  Sinkhorn iterations that find the column scale.
    """

    about: str
    layout: Layout
    rule: Literal["group", "tensor"] = "group"
    alpha: float = 0.0
    clip: float = 1.0
    balance: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise RecipeError(f"alpha is {self.alpha}, it must be at least 0 and below 1")
        if not 0 < self.clip <= 1:
            raise RecipeError(f"clip is {self.clip}, it must be above 0 and at most 1")
        if self.clip != 1 and not self.layout.uniform:
            raise RecipeError("clip applies to min-max grids; this recipe fits non-uniform levels")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for the manifest and for comparing runs."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"layout": self.layout.to_dict()}


RECIPES: Mapping[str, Recipe] = {
    "balanced-4": Recipe(
        "4 bits: trellis levels, 2 salient weights of 128 at 8 bits, column scale",
        Layout(
            bits=4,
            group_size=128,
            levels=LEVELS[4],
            trellis=True,
            scale="log8",
            salient_count=2,
            salient_bits=8,
            salient_grid="row",
            column_scale=True,
        ),
        alpha=2 / 128,
        balance=4,
    ),
    "balanced-3": Recipe(
        "3 bits: trellis levels, 4 salient weights of 128 at 7 bits, column scale",
        Layout(
            bits=3,
            group_size=128,
            levels=LEVELS[3],
            trellis=True,
            scale="log8",
            salient_count=4,
            salient_bits=7,
            salient_grid="row",
            column_scale=True,
        ),
        alpha=4 / 128,
        balance=4,
    ),
    "paper-4": Recipe(
        "4 bits as in arXiv 2501.09107: 8 % salient by one λ' per tensor, min-max grids",
        Layout(bits=4, group_size=128, salient_count=16, salient_bits=4, salient_grid="min-max"),
        rule="tensor",
        alpha=0.08,
    ),
    "paper-3": Recipe(
        "3 bits as in arXiv 2501.09107: 8 % salient, non-salient range clipped to 95 %",
        Layout(bits=3, group_size=128, salient_count=16, salient_bits=3, salient_grid="min-max"),
        rule="tensor",
        alpha=0.08,
        clip=0.95,
    ),
    "rtn-4": Recipe("4 bits, round to nearest, for comparison", Layout(bits=4, group_size=128)),
    "rtn-3": Recipe("3 bits, round to nearest, for comparison", Layout(bits=3, group_size=128)),
}
DEFAULT = "balanced-4"


def find(name: str) -> Recipe:
    """The recipe of that name. Raises RecipeError that lists the names there are."""
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe '{name}'; there are {', '.join(RECIPES)}")
    return RECIPES[name]


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
    changes: dict[str, Any] = {}
    if bits is not None and bits != layout.bits:
        changes["bits"] = bits
        if layout.levels is not None:
            changes["levels"] = LEVELS.get(bits)
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
        changes["salient_count"] = places
    try:
        adjusted = dataclasses.replace(layout, **changes)
    except FormatError as error:
        raise RecipeError(f"these options do not fit together: {error}") from error
    return dataclasses.replace(
        recipe, layout=adjusted, alpha=share, clip=recipe.clip if clip is None else clip
    )
