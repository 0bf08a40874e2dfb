"""The one family of errors users meet: what is wrong, where, and what to do."""

from collections.abc import Mapping


class PrecalibError(Exception):
    """Base of every error precalib raises on purpose; its text is written for the user."""


class FormatError(PrecalibError):
    """Packed tensors or a layout that break the format of `precalib_kernels.format.layout`."""


class SourceError(PrecalibError):
    """A checkpoint that cannot be quantized as it stands."""


class UnfitError(SourceError):
    """Weights that a recipe cannot hold; the run is worth nothing unless they are kept.

    faults: what is wrong with each of several tensors, by name; empty where one raised it.
    """

    def __init__(self, text: str, faults: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.faults = dict(faults or {})


class RecipeError(PrecalibError):
    """A recipe or option that does not exist or does not fit the checkpoint."""


class OutputError(PrecalibError):
    """An output directory that cannot be written, or is not what it should be."""


class ServingError(PrecalibError):
    """A layer or checkpoint that the vLLM plugin cannot serve."""
