"""What the user asked for, and the recipe that each module gets by it."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offline_quantize.checkpoint.source import Checkpoint
from offline_quantize.method import recipes
from offline_quantize.method.recipes import Recipe
from offline_quantize.planning import selection
from offline_quantize.planning.activation_options import ActivationOptions
from offline_quantize.planning.bit_allocation import allocate
from precalib_kernels.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for.

    recipe:      name of the main recipe, None for the default; `changes` adjust it.
    overrides:   (pattern, recipe name) pairs, the first that matches a module wins.
    keep:        patterns of modules to leave unquantized.
    target_bits: effective bits per weight that all quantized weights together may take, in place
                 of a recipe.
    head:        name of the recipe for the output head, None to leave it unquantized.
    embeddings:  name of the recipe for the input embeddings, None to leave them unquantized; of
                 the head, too, that a model shares with them, if `head` names no other.
    activations: how the inputs of layers become known; None to quantize without a forward pass.
    transform:   "value-output" to transform pairs of weights before, None for nothing.
    card:        whether a model card takes the place of the source's README.md.
    """

    recipe: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Sequence[tuple[str, str]] = ()
    keep: Sequence[str] = ()
    target_bits: float | None = None
    head: str | None = None
    embeddings: str | None = None
    activations: ActivationOptions | None = None
    transform: str | None = None
    card: bool = True

    @property
    def label(self) -> str:
        """The main recipe with its adjustments, as one writes it on the command line."""
        if self.target_bits is not None:
            return f"--target-bits {self.target_bits:g}"
        return " ".join([self.recipe or recipes.DEFAULT, *self.flags])

    @property
    def flags(self) -> list[str]:
        """The adjustments alone."""
        return [f"{_flag(name)} {v}" for name, v in self.changes.items() if v is not None]


class RecipeResolver:
    """The recipe of each module under the user's options.

    Raises RecipeError for options that are wrong by themselves.
    """

    def __init__(self, options: Options) -> None:
        for name, value in (*options.changes.items(), ("target_bits", options.target_bits)):
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{_flag(name)} {value}: give a finite number")
        self.target_bits = options.target_bits
        self.inputs_known = options.activations is not None
        if self.target_bits is not None and (options.recipe or options.flags):
            given = f"--recipe {options.recipe}" if options.recipe else options.flags[0]
            raise RecipeError(
                f"--target-bits {self.target_bits:g} chooses the recipes itself; leave out {given}"
            )
        main = recipes.find(options.recipe or recipes.DEFAULT)
        self.main = options.label, recipes.adjust(main, **options.changes)
        self.allocated: Mapping[str, tuple[str, Recipe]] = {}
        self.keep = [_pattern(text, "--keep") for text in options.keep]
        self.overrides = [
            (_pattern(text, "--override"), name, recipes.find(name))
            for text, name in options.overrides
        ]
        self.head = recipes.for_head(options.head) if options.head else None
        self.embeddings = recipes.for_head(options.embeddings) if options.embeddings else None
        self.used: set[str] = set()

    def recipe_for(self, module: str) -> tuple[str, Recipe]:
        """Label and recipe of a module."""
        for pattern, name, recipe in self.overrides:
            if pattern.search(module):
                self.used.add(pattern.pattern)
                return name, recipe
        if self.head and selection.HEAD.search(module):
            return self.head
        if self.embeddings and selection.EMBEDDINGS.search(module):
            return self.embeddings
        return self.allocated.get(module, self.main)

    def allocate(self, shapes: Mapping[str, tuple[int, ...]], source: Checkpoint) -> None:
        """Give each weight, by name, that no override takes a recipe; all meet the target."""
        assert self.target_bits is not None
        free: dict[str, tuple[int, int]] = {}
        number = nbytes = 0
        for name, (rows, columns) in shapes.items():
            label, recipe = self.recipe_for(module := selection.module_of(name))
            if label == self.main[0]:
                free[module] = rows, columns
            else:
                number += rows * columns
                nbytes += recipe.layout.stored_bytes(rows, columns)
        if free:
            self.allocated = allocate(
                free,
                self.target_bits,
                source.text_config,
                fixed=(number, nbytes),
                inputs_known=self.inputs_known,
            )

    def check_used(self, quantized: Iterable[str], unquantized: Iterable[str]) -> None:
        """Raise RecipeError for a pattern that matches no tensor of these names.

        Such a pattern is a typing error, which is found here before hours of work.
        """
        for pattern, _, _ in self.overrides:
            if pattern.pattern not in self.used:
                raise RecipeError(
                    f"--override {pattern.pattern!r} matches no module that is quantized and that "
                    "no earlier --override takes; compare it with the names that --dry-run shows"
                )
        modules = [selection.module_of(name) for name in (*quantized, *unquantized)]
        for pattern in self.keep:
            if not any(pattern.search(module) for module in modules):
                raise RecipeError(
                    f"--keep {pattern.pattern!r} matches no module; "
                    "compare it with the tensor names of the checkpoint"
                )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _pattern(text: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(
            f"{option} {text!r} is not a regular expression ({error}); "
            "quote it for the shell, and write \\. for a dot"
        ) from error
