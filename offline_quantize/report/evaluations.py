"""Results of `precalib eval --json`, as a report reads them."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.records import read_record
from offline_quantize.evaluation.result import EvaluationResult
from precalib_kernels.errors import InputError

EVALUATE_REMEDY = "make it with 'precalib eval … --json FILE'"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluated checkpoint; `own`: whether it is the one that the report is about."""

    result: EvaluationResult
    own: bool

    @property
    def measured_on(self) -> str:
        """What the original was and what was read: only equal ones can be compared."""
        text = self.result.text
        assert text is not None
        return f"{Path(self.result.source).name}, {text.tokens:,} tokens, {text.of}"


def read_evaluation(path: Path, directory: Path) -> Evaluation:
    """Read one result; `directory` is the checkpoint that the report is about.

    Raises InputError for a file that is no such result, lacks something, or holds a number that
    cannot be drawn.
    """
    result = read_record(path, EvaluationResult, InputError, EVALUATE_REMEDY)
    if result.text is None and not result.tasks:
        raise InputError(f"{path}: neither 'text' nor 'tasks' was measured; {EVALUATE_REMEDY}")
    for where, number in _numbers(result.to_json()):
        if not math.isfinite(number):
            raise InputError(f"{path}: '{where}' is {number}; {EVALUATE_REMEDY}")
    return Evaluation(result, Path(result.directory).resolve() == directory.resolve())


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value, with the names of the fields it is in."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{where}.{name}" if where else name)
    elif isinstance(value, tuple):
        for inner in value:
            yield from _numbers(inner, where)
    elif isinstance(value, int | float):
        yield where, value
