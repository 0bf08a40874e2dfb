"""Multiple-choice tasks: JSONL files with one {"query", "choices", "gold"} object per line."""

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from offline_quantize.checkpoint.records import Record
from offline_quantize.evaluation.bootstrap import mean_interval
from offline_quantize.evaluation.models import bos_tokens
from offline_quantize.evaluation.result import TaskResult
from precalib_kernels.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMALISATION = "log-likelihood of the choice per character (acc_norm of lm-eval)"
PROMPT = "{query} Answer:"  # and the choice follows after a space


class Question(Record):
    """A query, its possible answers, and the index of the right one."""

    query: str
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    gold: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _gold_names_a_choice(self) -> Self:
        if self.gold >= len(self.choices):
            raise ValueError("gold is no index of choices")
        return self


@dataclasses.dataclass(frozen=True)
class Answer:
    """One choice, ready to be scored: query and choice as tokens.

    start: index of the choice's first token;  length: characters of the choice.
    """

    tokens: Tensor
    start: int
    length: int


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file. Raises InputError that names a damaged line."""
    form = 'each line must be like {"query": "…", "choices": ["…", "…"], "gold": 0}'
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(questions) == limit:
                    break
                if line.strip():
                    questions.append(_question(line, f"{path}, line {number}: {form}"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}); {form}") from error
    if not questions:
        raise InputError(f"{path}: holds no question; {form}")
    return questions


def answers(
    question: Question,
    tokenizer: "PreTrainedTokenizerBase",
    window: int,
    begin: Sequence[int] | None = None,
) -> list[Answer]:
    """All choices of a question; of what is longer than `window` tokens the beginning is cut off.

    begin: tokens before the query; None for those that the tokenizer adds.

    The choice's tokens are those that query and choice together do not share with the query alone.
    """
    bos = bos_tokens(tokenizer) if begin is None else list(begin)
    prompt = PROMPT.format(query=question.query)
    alone = bos + tokenizer(prompt, add_special_tokens=False).input_ids
    prepared = []
    for choice in question.choices:
        whole = bos + tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids
        start = next(
            (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), None
        )
        start = max(1, min(len(alone), len(whole) - 1) if start is None else start)
        cut = max(0, min(len(whole) - window, start - 1))
        prepared.append(Answer(torch.tensor(whole[cut:]), start - cut, len(choice)))
    return prepared


@torch.inference_mode()
def score(model: "PreTrainedModel", prepared: Sequence[Answer]) -> Tensor:
    """Length-normalised log-likelihoods of a question's choices, float32 [choices]."""
    longest = max(len(answer.tokens) for answer in prepared)
    batch = torch.zeros(len(prepared), longest, dtype=torch.int64)  # a causal model never looks
    for row, answer in zip(batch, prepared, strict=True):  # at the padding behind a choice
        row[: len(answer.tokens)] = answer.tokens
    first = min(answer.start for answer in prepared) - 1
    logits = _last_logits(model, batch.to(model.device), longest - first)
    first = longest - logits.shape[1]
    scores = []
    for row, answer in zip(logits, prepared, strict=True):
        choice = answer.tokens[answer.start :, None].to(row.device)
        before = row[answer.start - 1 - first : len(answer.tokens) - 1 - first]
        before = before.float().log_softmax(-1)
        scores.append(before.gather(1, choice).sum() / answer.length)
    return torch.stack(scores).cpu()


def _last_logits(model: "PreTrainedModel", batch: Tensor, count: int) -> Tensor:
    """Logits at the last `count` positions, or at all where a model computes no fewer.

    The head of a small model with a large vocabulary takes longer than all else.
    """
    fewer = "logits_to_keep" in inspect.signature(model.forward).parameters
    found: Tensor = model(batch, **({"logits_to_keep": count} if fewer else {})).logits
    return found


def predictions(model: "PreTrainedModel", prepared: Iterable[Sequence[Answer]]) -> Tensor:
    """Index of the best choice of every question, int64 [n]."""
    return torch.tensor([int(score(model, choices).argmax()) for choices in prepared])


def summary(questions: Sequence[Question], original: Tensor, quantized: Tensor) -> TaskResult:
    """Accuracy of both models with 95 % intervals by bootstrap over questions.

    original, quantized: their `predictions`, int64 [n].
    """
    gold = torch.tensor([question.gold for question in questions])
    right, original_right = (quantized == gold).float(), (original == gold).float()
    return TaskResult(
        questions=len(questions),
        normalisation=NORMALISATION,
        accuracy=float(right.mean()),
        accuracy_interval=mean_interval(right),
        original_accuracy=float(original_right.mean()),
        original_accuracy_interval=mean_interval(original_right),
        difference_interval=mean_interval(right - original_right),
        same_choice=float((quantized == original).float().mean()),
    )


def _question(line: str, complaint: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        raise InputError(complaint) from error
