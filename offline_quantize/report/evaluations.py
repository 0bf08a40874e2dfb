"""Results of `precalib eval --json`, as a report reads them."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import read_json
from precalib_kernels.errors import SourceError

EVALUATE_REMEDY = "make it with 'precalib eval … --json FILE'"
INTERVALS = ("kl", "agreement", "perplexity", "original_perplexity")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluated checkpoint.

    bits: its true bits per weight.
    text: the comparison over text, None if only tasks were measured.
    own:  whether it is of the checkpoint that the report is about.
    """

    recipe: str
    bits: float
    source: str
    text: Mapping[str, Any] | None
    tasks: Mapping[str, Mapping[str, Any]]
    own: bool

    @property
    def measured_on(self) -> str:
        """What the original was and what was read: only equal ones can be compared."""
        assert self.text is not None
        return f"{self.source}, {self.text['tokens']:,} tokens, {self.text['of']}"


def read_evaluation(path: Path, directory: Path) -> Evaluation:
    """Read one result; `directory` is the checkpoint that the report is about.

    Raises SourceError for a file that is no such result or lacks something.
    """
    value = read_json(path, SourceError, EVALUATE_REMEDY)

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise SourceError(f"{path}: {what} is missing or damaged; {EVALUATE_REMEDY}")

    for key in ("directory", "source", "recipe"):
        require(isinstance(value.get(key), str), f"'{key}'")
    require(_is_number(value.get("bits_per_weight")), "'bits_per_weight'")
    text, tasks = value.get("text"), value.get("tasks", {})
    if text is not None:
        require(_is_comparison(text), "'text'")
    whole = isinstance(tasks, dict) and all(map(_is_task, tasks.values()))
    require(whole and (text is not None or bool(tasks)), "'tasks'")
    own = Path(value["directory"]).resolve() == directory.resolve()
    return Evaluation(
        value["recipe"], value["bits_per_weight"], Path(value["source"]).name, text, tasks, own
    )


def _is_comparison(text: Any) -> bool:
    return (
        isinstance(text, dict)
        and isinstance(text.get("of"), str)
        and _is_number(text.get("tokens"))
        and all(
            _is_number(text.get(name)) and _is_interval(text.get(f"{name}_interval"))
            for name in INTERVALS
        )
    )


def _is_task(task: Any) -> bool:
    names = ("accuracy", "original_accuracy", "same_choice", "questions")
    return isinstance(task, dict) and all(_is_number(task.get(name)) for name in names)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
