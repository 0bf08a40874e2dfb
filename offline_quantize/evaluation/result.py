"""What `precalib eval` measures, as it prints it and writes it to a file."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat

from offline_quantize.checkpoint.records import FileName, Record

# JSON has no tuples, so a list is taken for one.
Interval = Annotated[tuple[float, float], Field(strict=False)]


class TextResult(Record):
    """A model compared with its original over the same tokens of a text.

    of:          the text: names of files, or who wrote it.
    window:      tokens that a model sees at once;  tokens: predicted tokens in all.
    kl:          KL(original ‖ quantized) per token in nats, mean;  kl_99: its 99th percentile.
    agreement:   share of tokens where both models have the same first choice (top-1).
    perplexity:  of the quantized model;  original_perplexity: of the original.
    tail_mass:   the original's mass outside its likeliest tokens, mean; in JSON "others_mass".
    *_interval:  95 % intervals by bootstrap over blocks of neighbouring tokens.
    """

    of: FileName
    window: int
    tokens: int
    kl: float
    kl_interval: Interval
    kl_99: float
    agreement: float
    agreement_interval: Interval
    perplexity: float
    perplexity_interval: Interval
    original_perplexity: float
    original_perplexity_interval: Interval
    tail_mass: Annotated[float, Field(alias="others_mass")]


class TaskResult(Record):
    """Multiple choice by a model and by its original.

    normalisation: how choices are compared.
    accuracy:      share of right choices of the quantized model.
    difference_interval: of its accuracy minus the original's.
    same_choice:   share of questions where both choose the same.
    *_interval:    95 % intervals by bootstrap over questions.
    """

    questions: int
    normalisation: str
    accuracy: float
    accuracy_interval: Interval
    original_accuracy: float
    original_accuracy_interval: Interval
    difference_interval: Interval
    same_choice: float


class EvaluationResult(Record):
    """A packed checkpoint compared with its source.

    bits_per_weight: effective bits, all stored bytes counted.
    dtype:           what was computed in.
    begin_token:     the token before every text; None if there is none.
    warning:         why the result may be meaningless.
    text:            None if only tasks were measured;  tasks: by file, None if only text was.
    """

    ENTRIES: ClassVar[Mapping[str, str]] = {"tasks": "task"}

    directory: FileName
    source: FileName
    recipe: str
    bits_per_weight: FiniteFloat
    dtype: str
    begin_token: int | None = None
    warning: str | None = None
    text: TextResult | None = None
    tasks: Mapping[FileName, TaskResult] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values, without what was not measured."""
        return self.model_dump(by_alias=True, exclude_none=True)
