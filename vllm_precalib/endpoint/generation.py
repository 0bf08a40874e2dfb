"""The answer to a prompt, token by token with probabilities, through vLLM's OpenAI routes."""

import json
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp

from vllm_precalib.endpoint import in_process
from vllm_precalib.endpoint.comparison import compare
from vllm_precalib.endpoint.schemas import Alternative, Done, Event, Problem, Prompt, Token
from vllm_precalib.endpoint.served_model import ServedModel


async def generate(
    app: ASGIApp, model: ServedModel, prompt: Prompt, key: str | None
) -> AsyncIterator[Event]:
    """Tokens as they are generated; then the comparison, if there is another server; then the end.

    key: the API key of the request, with which vLLM's routes are asked.
    """
    started = time.monotonic()
    ids: list[int] = []
    count = prompt_length = 0
    path = "/v1/chat/completions" if prompt.chat else "/v1/completions"
    async with in_process.post(app, path, _body(model.name, prompt), key) as answer:
        if answer.status != 200:
            yield Problem(text=error_text(await answer.body()))
            return
        async for chunk in answer.events():
            if "error" in chunk:
                yield Problem(text=error_text(json.dumps(chunk).encode()))
                return
            if given := _prompt_ids(chunk):
                ids, prompt_length = list(given), len(given)
            for choice in chunk.get("choices", ()):
                ids += choice.get("token_ids") or ()
                for token in _tokens(choice):
                    count += 1
                    yield token
    if model.options.against and prompt_length and len(ids) > prompt_length:
        yield await compare(app, model, ids, prompt_length, prompt.alternatives, key)
    yield Done(tokens=count, seconds=time.monotonic() - started)


def error_text(body: bytes) -> str:
    """What a route says is wrong."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:500] or "The server gave no answer."


def _body(name: str, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": name,
        "max_tokens": prompt.max_tokens,
        "temperature": prompt.temperature,
        "stream": True,
        "return_token_ids": True,
    }
    if prompt.chat:
        message = {"role": "user", "content": prompt.prompt}
        return body | {
            "messages": [message],
            "logprobs": True,
            "top_logprobs": prompt.alternatives,
        }
    return body | {"prompt": prompt.prompt, "logprobs": prompt.alternatives}


def _prompt_ids(chunk: Mapping[str, Any]) -> Sequence[int] | None:
    """Ids of the prompt's tokens, which the first chunk has: of a chat itself, else its choice."""
    choices = chunk.get("choices") or [{}]
    ids: Sequence[int] | None = chunk.get("prompt_token_ids") or choices[0].get("prompt_token_ids")
    return ids


def _tokens(choice: Mapping[str, Any]) -> Iterator[Token]:
    """The tokens of one choice of a chunk, of either route."""
    found = choice.get("logprobs") or {}
    for entry in found.get("content") or ():  # a chat
        top = [(other["token"], other["logprob"]) for other in entry.get("top_logprobs") or ()]
        yield _token(entry["token"], entry["logprob"], top)
    texts, values = found.get("tokens") or (), found.get("token_logprobs") or ()
    tops = found.get("top_logprobs") or [{}] * len(texts)
    for text, value, others in zip(texts, values, tops, strict=False):
        yield _token(text, value, list((others or {}).items()))


def _token(text: str, value: float | None, others: Sequence[tuple[str, float]]) -> Token:
    likeliest = sorted(others, key=lambda other: -other[1])
    shown = [Alternative(text=other, probability=math.exp(log)) for other, log in likeliest]
    probability = math.exp(value) if value is not None else 0.0
    return Token(text=text, probability=probability, alternatives=shown)
