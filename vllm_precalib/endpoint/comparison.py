"""The tokens of an answer under two models: the one served here, and that of another server."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from starlette.types import ASGIApp

from vllm_precalib.endpoint import in_process
from vllm_precalib.endpoint.schemas import Alternative, ComparedToken, Comparison, Problem
from vllm_precalib.endpoint.served_model import ServedModel

LISTED = 20  # tokens of a position whose probabilities are asked for; vLLM's own limit
SECONDS = 120
MOST_BYTES = 64 << 20

# Log probabilities of the listed tokens of a position, by token id.
Position = Mapping[int, float]


async def compare(
    app: ASGIApp,
    model: ServedModel,
    ids: Sequence[int],
    start: int,
    alternatives: int,
    key: str | None,
) -> Comparison | Problem:
    """The tokens ids[start:] under the model of `model.options.against`, and the KL to this one."""
    address = model.options.against
    assert address is not None
    try:
        async with in_process.post(app, "/v1/completions", _request(model.name, ids), key) as ours:
            here = _positions(ours.status, await ours.body())
        async with asyncio.timeout(SECONDS):
            there, texts = await _other(address, ids)
        tokens = [
            _token(ids[i], there[i], here[i], texts, alternatives) for i in range(start, len(ids))
        ]
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        OSError,
        aiohttp.ClientError,
    ) as error:
        reason = str(error) or type(error).__name__
        return Problem(text=f"{address} could not be compared with ({reason}).")
    mean = sum(token.kl for token in tokens) / len(tokens)
    return Comparison(against=address, tokens=tokens, mean_kl=mean)


def kl_divergence(original: Position, quantized: Position) -> float:
    """KL(original ‖ quantized) in nats over the tokens that both list, all others taken as one.

    Merging tokens can only make a KL divergence smaller, so the true one is at least this.
    """
    both = original.keys() & quantized.keys()
    pairs = [(math.exp(original[i]), math.exp(quantized[i])) for i in both]
    rest = tuple(max(0.0, 1.0 - sum(column)) for column in zip(*pairs, strict=True)) or (1.0, 1.0)
    total = 0.0
    for p, q in (*pairs, rest):
        if p > 0:
            total += p * math.log(p / max(q, 1e-12))
    return max(0.0, total)


def _request(name: str, ids: Sequence[int]) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": LISTED,
    }


async def _other(address: str, ids: Sequence[int]) -> tuple[list[Position], dict[int, str]]:
    """Positions under the other server's first model, and the texts of their tokens."""
    base = address.rstrip("/")
    async with aiohttp.ClientSession(trust_env=False) as session:
        async with session.get(f"{base}/v1/models") as answer:
            name = json.loads(await _read(answer))["data"][0]["id"]
        async with session.post(f"{base}/v1/completions", json=_request(name, ids)) as answer:
            body = await _read(answer)
            return _positions(answer.status, body), _texts(body)


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = await answer.content.read(MOST_BYTES)
    while piece := await answer.content.read(MOST_BYTES):
        body += piece
        if len(body) > MOST_BYTES:
            raise ValueError("its answer is too long")
    return body


def _positions(status: int, body: bytes) -> list[Position]:
    """The prompt's log probabilities; the first position, which has none, is empty."""
    if status != 200:
        from vllm_precalib.endpoint.generation import error_text

        raise ValueError(error_text(body))
    entries = json.loads(body)["choices"][0]["prompt_logprobs"]
    return [{int(i): e["logprob"] for i, e in (entry or {}).items()} for entry in entries]


def _texts(body: bytes) -> dict[int, str]:
    entries = json.loads(body)["choices"][0]["prompt_logprobs"]
    return {
        int(i): e.get("decoded_token") or "" for entry in entries if entry for i, e in entry.items()
    }


def _token(
    token: int, there: Position, here: Position, texts: Mapping[int, str], alternatives: int
) -> ComparedToken:
    likeliest = sorted(there.items(), key=lambda item: -item[1])[:alternatives]
    return ComparedToken(
        text=texts.get(token, ""),
        probability=math.exp(there[token]),
        alternatives=[Alternative(text=texts[i], probability=math.exp(v)) for i, v in likeliest],
        kl=kl_divergence(there, here),
    )
