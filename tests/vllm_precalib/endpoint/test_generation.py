"""Answers with probabilities, through vLLM's routes, and their comparison with another server."""

import asyncio
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_precalib.endpoint.comparison import kl_divergence
from vllm_precalib.endpoint.generation import generate
from vllm_precalib.endpoint.in_process import post
from vllm_precalib.endpoint.schemas import Prompt

KEY = "a key of this test"
GENERATE = "/precalib/api/v1/generate"
WORDS = [" Paris", " is", " <b>", " it"]


def events(answer):
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line]


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_comes_token_by_token(build, chat):
    served = build()
    body = {"prompt": "x", "chat": chat, "max_tokens": 7, "alternatives": 2}
    *tokens, done = events(served.client.post(GENERATE, json=body))
    assert [token["text"] for token in tokens] == WORDS
    assert all(token["probability"] == pytest.approx(0.75) for token in tokens)
    (first, second) = tokens[2]["alternatives"]
    assert first == {"text": " <b>", "probability": pytest.approx(0.75)}
    assert second == {"text": " no", "probability": pytest.approx(0.125)}
    assert (done["kind"], done["tokens"]) == ("done", 4)
    ((asked, key),) = served.standin.asked
    assert asked["model"] == "served"
    assert asked["max_tokens"] == 7
    assert asked["temperature"] == 0
    assert key is None
    if chat:
        assert asked["messages"] == [{"role": "user", "content": "x"}]
        assert (asked["logprobs"], asked["top_logprobs"]) == (True, 2)
    else:
        assert (asked["prompt"], asked["logprobs"]) == ("x", 2)


def test_vllms_route_is_asked_with_the_key_of_the_request(build):
    served = build([KEY])
    answer = served.client.post(
        GENERATE, json={"prompt": "x"}, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert events(answer)[-1]["kind"] == "done"
    assert served.standin.asked[0][1] == f"Bearer {KEY}"


def test_what_vllm_refuses_is_passed_on(build):
    (problem,) = events(build().client.post(GENERATE, json={"prompt": "x", "max_tokens": 1000}))
    assert problem == {"kind": "problem", "text": "too many tokens"}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": "x" * 32_001},
        {"max_tokens": 0},
        {"max_tokens": 1025},
        {"temperature": -1},
        {"alternatives": 11},
        {"unknown": 1},
    ],
)
def test_impossible_requests_are_refused(build, change):
    served = build()
    assert served.client.post(GENERATE, json={"prompt": "x"} | change).status_code == 422
    assert served.standin.asked == []


def test_the_other_server_sees_the_same_tokens(build, other_server):
    served = build([KEY], against=other_server.url)
    headers = {"Authorization": f"Bearer {KEY}"}
    *_, comparison, done = events(
        served.client.post(GENERATE, json={"prompt": "x", "alternatives": 2}, headers=headers)
    )
    ids = [1, 2, 3, 100, 101, 102, 103]
    assert served.standin.asked[1][0]["prompt"] == ids
    ((asked, key),) = other_server.asked
    assert (asked["model"], asked["prompt"]) == ("original", ids)
    assert key is None  # the key of this server is not for others
    assert comparison["against"] == other_server.url
    assert [token["text"] for token in comparison["tokens"]] == ["t100", "t101", "t102", "t103"]
    # original .375, .375 and a rest of .25 against .5, .25 and .25
    expected = 0.375 * math.log(0.375 / 0.5) + 0.375 * math.log(0.375 / 0.25)
    for token in comparison["tokens"]:
        assert token["probability"] == pytest.approx(0.375)
        assert token["kl"] == pytest.approx(expected, rel=1e-3)
        assert len(token["alternatives"]) == 2
    assert comparison["mean_kl"] == pytest.approx(expected, rel=1e-3)
    assert done["tokens"] == 4


def test_another_server_that_is_gone_is_named(build):
    served = build(against="http://127.0.0.1:9")
    *tokens, problem, done = events(served.client.post(GENERATE, json={"prompt": "x"}))
    assert len(tokens) == 4
    assert problem["text"].startswith("http://127.0.0.1:9 could not be compared with (")
    assert done["kind"] == "done"


def test_who_goes_ends_the_request(build, model_of):
    served = build()
    served.standin.endless = True

    async def leave_early():
        stream = generate(served.app, model_of(served.app), Prompt(prompt="x"), None)
        first = await anext(stream)
        await stream.aclose()
        return first

    assert asyncio.run(leave_early()).text == " Paris"
    assert served.standin.ended.wait(5)


def test_an_application_that_fails_is_an_error_and_no_silence():
    async def broken(scope, receive, send):
        raise ValueError("broken")

    async def broken_later(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("broken")

    async def ask(app):
        async with asyncio.timeout(5), post(app, "/x", {}, None) as answer:
            return await answer.body()

    with pytest.raises(RuntimeError, match="/x did not answer"):
        asyncio.run(ask(broken))
    assert asyncio.run(ask(broken_later)) == b"half"


DISTRIBUTIONS = st.lists(st.floats(1e-4, 1), min_size=6, max_size=6)


@given(DISTRIBUTIONS, DISTRIBUTIONS, st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_the_kl_of_listed_tokens_is_at_most_the_whole(first, second, shown, other):
    p = [value / sum(first) for value in first]
    q = [value / sum(second) for value in second]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    part = kl_divergence({i: math.log(p[i]) for i in shown}, {i: math.log(q[i]) for i in other})
    assert -1e-12 <= part <= whole + 1e-9


@given(DISTRIBUTIONS, DISTRIBUTIONS)
def test_the_kl_of_all_tokens_is_the_whole(first, second):
    p = [value / sum(first) for value in first]
    q = [value / sum(second) for value in second]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    listed = [{i: math.log(v) for i, v in enumerate(values)} for values in (p, q)]
    assert kl_divergence(*listed) == pytest.approx(whole, abs=1e-9)
