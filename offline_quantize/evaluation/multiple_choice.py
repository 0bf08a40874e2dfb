"""Multiple-choice tasks: JSONL files with one {"query", "choices", "gold"} object per line."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.evaluation.bootstrap import mean_interval
from offline_quantize.evaluation.models import bos_tokens
from precalib_kernels.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMALISATION = "log-likelihood of the choice per character (acc_norm of lm-eval)"
PROMPT = "{query} Answer:"  # and the choice follows after a space


@dataclasses.dataclass(frozen=True)
class Question:
    """A query, its possible answers, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """One choice, ready to be scored: query and choice as tokens.

    start: index of the choice's first token;  length: characters of the choice.
    """

    tokens: Tensor
    start: int
    length: int


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file. Raises SourceError that names a damaged line."""
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
        raise SourceError(f"{path}: cannot be read ({reason}); {form}") from error
    if not questions:
        raise SourceError(f"{path}: holds no question; {form}")
    return questions


def answers(question: Question, tokenizer: "PreTrainedTokenizerBase", window: int) -> list[Answer]:
    """All choices of a question; of what is longer than `window` tokens the beginning is cut off.

    The choice's tokens are those that query and choice together do not share with the query alone.
    """
    opening = bos_tokens(tokenizer)
    prompt = PROMPT.format(query=question.query)
    alone = opening + tokenizer(prompt, add_special_tokens=False).input_ids
    prepared = []
    for choice in question.choices:
        whole = opening + tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids
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
    logits = model(batch.to(model.device)).logits
    scores = []
    for row, answer in zip(logits, prepared, strict=True):
        choice = answer.tokens[answer.start :, None].to(row.device)
        before = row[answer.start - 1 : len(answer.tokens) - 1].float().log_softmax(-1)
        scores.append(before.gather(1, choice).sum() / answer.length)
    return torch.stack(scores).cpu()


def picks(model: "PreTrainedModel", prepared: Iterable[Sequence[Answer]]) -> Tensor:
    """Index of the best choice of every question, int64 [n]."""
    return torch.tensor([int(score(model, choices).argmax()) for choices in prepared])


def summary(questions: Sequence[Question], original: Tensor, quantized: Tensor) -> dict[str, Any]:
    """Accuracy of both models with 95 % intervals by bootstrap over questions."""
    gold = torch.tensor([question.gold for question in questions])
    right, original_right = (quantized == gold).float(), (original == gold).float()
    return {
        "questions": len(questions),
        "normalisation": NORMALISATION,
        "accuracy": float(right.mean()),
        "accuracy_interval": mean_interval(right),
        "original_accuracy": float(original_right.mean()),
        "original_accuracy_interval": mean_interval(original_right),
        "difference_interval": mean_interval(right - original_right),
        "same_choice": float((quantized == original).float().mean()),
    }


def _question(line: str, complaint: str) -> Question:
    try:
        fields = json.loads(line)
        query, choices, gold = fields["query"], tuple(fields["choices"]), fields["gold"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(complaint) from error
    whole = isinstance(query, str) and choices and all(isinstance(c, str) and c for c in choices)
    if not whole or type(gold) is not int or not 0 <= gold < len(choices):
        raise SourceError(complaint)
    return Question(query, choices, gold)
