"""The begin token: when it is added, when a user is warned, and that every path takes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_quantize.evaluation import begin_token, command
from offline_quantize.evaluation.models import load_original, load_tokenizer
from precalib_kernels.errors import UsageError

BEGIN = 256  # of `byte_llama`


@pytest.fixture(scope="session")
def plain_source(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, with a tokenizer that puts nothing before a text."""
    folder = tmp_path_factory.mktemp("plain") / "source"
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = None
    file.write_text(json.dumps(tokenizer))
    assert load_tokenizer(folder)("ab").input_ids == load_tokenizer(source)("ab").input_ids[1:]
    return folder


def test_option_gives_what_the_tokenizer_would_add(
    plain_source: Path, source: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"query": "Q", "choices": ["one", "two"], "gold": 1}))
    request = command.Request([text], tasks=[tasks], tokens=300)
    wanted = command.Request([text], tasks=[tasks], tokens=300, begin_token=True)
    added = command.evaluate(packed, source, request)
    asked = command.evaluate(packed, plain_source, wanted)
    plain = command.evaluate(packed, plain_source, request)
    assert (added.begin_token, asked.begin_token, plain.begin_token) == (BEGIN, BEGIN, None)
    assert added.text == asked.text != plain.text
    assert added.tasks == asked.tasks
    assert command.evaluate(packed, source, wanted) == added  # it is not added twice
    assert "begin_token" not in plain.to_json()


def test_own_text_begins_with_it_anyway(plain_source: Path, packed: Path) -> None:
    request = command.Request(self_generated=True, tokens=64)
    result = command.evaluate(packed, plain_source, request)
    assert (result.begin_token, result.warning) == (BEGIN, None)


def test_no_token_to_add(source: Path) -> None:
    class Nameless:
        bos_token_id = None

        def __call__(self, _: str) -> Any:
            return load_tokenizer(source)("", add_special_tokens=False)

    tokenizer: Any = Nameless()
    assert begin_token.begin_tokens(tokenizer, {}, False) == []
    assert begin_token.begin_tokens(tokenizer, {"bos_token_id": [7, 8]}, True) == [7]
    with pytest.raises(UsageError, match="names a begin token; leave it out"):
        begin_token.begin_tokens(tokenizer, {}, True)


def test_perplexities_are_of_the_same_tokens(source: Path) -> None:
    model = load_original(source, torch.float32, "cpu")
    texts = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 1])]
    losses = [[], []]
    with torch.inference_mode():
        for text in texts:
            for found, begin in zip(losses, ([], [BEGIN]), strict=True):
                whole = [*begin, *text.tolist()]
                p = model(torch.tensor([whole])).logits[0].softmax(-1)
                for place in range(len(begin) + 1, len(whole)):
                    found.append(-p[place - 1, whole[place]].log())
    assert len(losses[0]) == len(losses[1]) == 4
    expected = torch.stack([torch.stack(found).mean().exp() for found in losses])
    torch.testing.assert_close(begin_token.perplexities(model, texts, BEGIN), expected)


@pytest.mark.parametrize(("without", "warned"), [(61.4, True), (25.7, True), (25.5, False)])
def test_warned_where_it_matters(without: float, warned: bool) -> None:
    seen = []

    def measure(texts: list[Tensor], token: int) -> Tensor:
        seen.append((len(texts), token))
        return torch.tensor([without, 23.3])

    texts = [torch.tensor([1]), *(torch.tensor([1, 2]) for _ in range(9))]
    sentence = begin_token.advice(2, texts, measure)
    assert seen == [(begin_token.SAMPLES, 2)]
    assert (sentence is not None) == warned
    if sentence:
        assert f"one (2), and with it the original's perplexity is 23.3 instead of {without}" in (
            sentence
        )
        assert "likely meaningless; measure again with --begin-token" in sentence
    assert begin_token.advice(2, [torch.tensor([1])], measure) is None


def test_warning_is_shown_and_kept(
    precalib: Callable[..., Any],
    plain_source: Path,
    packed: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "result.json"
    words = ("eval", packed, "--against", plain_source, "--text", text, "--json", file)
    quiet = precalib(*words)
    assert quiet.code == 0
    assert "warning" not in quiet.err  # a random model needs no begin token
    monkeypatch.setattr(begin_token, "NEEDED", 0.0)
    loud = precalib(*words)
    assert loud.code == 0
    assert "precalib: warning: the tokenizer adds no begin token although" in loud.err
    assert json.loads(file.read_text())["warning"].endswith("measure again with --begin-token")
    asked = precalib(*words, "--begin-token")
    assert "warning" not in asked.err
    assert json.loads(file.read_text())["begin_token"] == BEGIN
