"""How the inputs of layers become known, as the user asked for it."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precalib_kernels.errors import InputError, UsageError

TOKENS, TOKENS_WITH_FEEDBACK = 1024, 4096  # enough; docs/method.md


@dataclasses.dataclass(frozen=True)
class ActivationOptions:
    """What goes through the model before weights are quantized, and what is made of it.

    text:     "random" for random token ids, "self" for text that the model writes, or a file.
    tokens:   how many.
    feedback: whether codes take up the errors of earlier ones, for which Hessians are needed.
    """

    text: str = "random"
    tokens: int = TOKENS
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise UsageError(f"--activation-tokens {self.tokens}: give at least 2")

    @property
    def file(self) -> Path | None:
        """The text file, if it is one."""
        return None if self.text in ("random", "self") else Path(self.text)

    def to_json(self) -> dict[str, Any]:
        """What the result depends on; of a file, its name and contents.

        Raises InputError for a file that cannot be read.
        """
        values = dataclasses.asdict(self)
        if self.file is not None:
            values |= {"text": "file", "file": self.file.name, "sha256": self._digest}
        return values

    @functools.cached_property
    def _digest(self) -> str:
        assert self.file is not None
        try:
            with self.file.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"{self.file}: cannot be read ({error.strerror}); give a text file to "
                "--activations, or one of none, random, self"
            ) from error


def describe(activations: Mapping[str, Any]) -> str:
    """What went through the model, in a few words, from the record of a run."""
    tokens = f"{activations['tokens']:,}"
    text = {
        "random": f"{tokens} random tokens",
        "self": f"{tokens} tokens that the model wrote",
        "file": f"at most {tokens} tokens of {activations.get('file')}",
    }[activations["text"]]
    return f"{text} and error feedback" if activations["feedback"] else text


def describe_tuning(tuned: Mapping[str, int] | None) -> str:
    """What follows `describe` for a run whose scales were tuned; nothing for others."""
    return f"; scales tuned on {tuned['tokens']:,} tokens that the model wrote" if tuned else ""
