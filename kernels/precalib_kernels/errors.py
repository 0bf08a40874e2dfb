"""The one family of errors users meet: what is wrong, where, and what to do."""

import re
from collections.abc import Mapping

LONG_WORD = re.compile(r"(\S{500})\S{500,}(\S{100})")


class PrecalibError(Exception):
    """Base of every error precalib raises on purpose; its text is written for the user.

    Names and values in it may come from a file, so words longer than any path are shortened.
    """

    def __init__(self, text: str) -> None:
        super().__init__(LONG_WORD.sub(r"\1…\2", text))


class FormatError(PrecalibError):
    """Packed tensors or a layout that break the format of `precalib_kernels.format.layout`."""


class UsageError(PrecalibError):
    """Options that are wrong or exclude each other, or an optional package that is missing."""


class InputError(PrecalibError):
    """A file named by the user, other than a checkpoint, that is unreadable or damaged."""


class SourceError(PrecalibError):
    """A checkpoint that cannot be read, or cannot be quantized as it stands."""


class UnfitError(SourceError):
    """Weights that a recipe cannot hold; the run is worth nothing unless they are kept.

    faults: what is wrong with each of several tensors, by name; empty where one raised it.
    """

    def __init__(self, text: str, faults: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.faults = dict(faults or {})


class RecipeError(PrecalibError):
    """A recipe, or modules chosen for it, that do not exist or do not fit the checkpoint."""


class OutputError(PrecalibError):
    """An output directory that cannot be written, or is not what it should be."""


class ServingError(PrecalibError):
    """A layer or checkpoint that the vLLM plugin cannot serve."""
