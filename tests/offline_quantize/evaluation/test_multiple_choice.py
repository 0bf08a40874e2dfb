import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.evaluation.multiple_choice import (
    Answer,
    Question,
    answers,
    predictions,
    score,
    summary,
)

BEGIN = 256


def test_score_by_hand(bigram: Callable[[Tensor], Any]) -> None:
    """Two choices under a bigram model: ln p of each token of the choice, over its characters."""
    share = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    choices = [
        Answer(torch.tensor([0, 1, 1, 2]), start=2, length=5),
        Answer(torch.tensor([0, 1, 0]), start=2, length=2),
    ]
    found = score(bigram(share.log()), choices)
    expected = [(math.log(0.6) + math.log(0.3)) / 5, math.log(0.1) / 2]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert predictions(bigram(share.log()), [choices, choices[::-1]]).tolist() == [0, 1]


def test_answers_split_where_the_choice_begins(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    question = Question(query="Question: is it?\n", choices=("yes", "not now"), gold=0)
    for choice, answer in zip(question.choices, answers(question, tokenizer, 100), strict=True):
        assert tokenizer.decode(answer.tokens[1 : answer.start]) == "Question: is it?\n Answer:"
        assert tokenizer.decode(answer.tokens[answer.start :]) == f" {choice}"
        assert (int(answer.tokens[0]), answer.length) == (BEGIN, len(choice))
    short = answers(question, tokenizer, 12)[1]
    assert tokenizer.decode(short.tokens) == "wer: not now"[-12:]
    assert tokenizer.decode(short.tokens[short.start :]) == " not now"
    shorter = answers(question, tokenizer, 3)[1]  # the choice alone is longer: all of it
    assert tokenizer.decode(shorter.tokens) == ": not now"


def test_padding_changes_nothing(source: Path) -> None:
    model = load_original(source, torch.float32, "cpu")
    question = Question(query="Which?", choices=("a", "a much longer one", "bc"), gold=0)
    prepared = answers(question, load_tokenizer(source), 128)
    alone = torch.cat([score(model, [answer]) for answer in prepared])
    torch.testing.assert_close(score(model, prepared), alone, rtol=1e-4, atol=1e-5)


def test_only_logits_that_are_read_are_computed(source: Path) -> None:
    model = load_original(source, torch.float32, "cpu")
    question = Question(query="Which of these two is it?", choices=("one", "either"), gold=0)
    prepared = answers(question, load_tokenizer(source), 128)
    computed: list[int] = []
    model.lm_head.register_forward_hook(lambda *args: computed.append(args[2].shape[1]))
    found = score(model, prepared)
    for answer, likelihood in zip(prepared, found, strict=True):
        whole = model(answer.tokens[None]).logits[0].log_softmax(-1)
        choice = answer.tokens[answer.start :, None]
        taken = whole[answer.start - 1 : -1].gather(1, choice).sum() / answer.length
        torch.testing.assert_close(likelihood, taken, rtol=1e-4, atol=1e-5)
    assert computed[0] == len(" either") + 1  # one token a character; and the one before


def test_summary_of_tasks() -> None:
    questions = [Question(query="?", choices=("a", "b"), gold=gold) for gold in (0, 1, 1, 0)]
    found = summary(questions, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert found.original_accuracy == 0.75
    assert found.accuracy == 0.5
    assert found.same_choice == 0.75
    assert found.accuracy_interval[0] <= 0.5 <= found.accuracy_interval[1]
