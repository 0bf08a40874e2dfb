"""The page of a real `vllm serve` in a browser: one server, and all that is looked at."""

import contextlib
import json
import re
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import transformers
from playwright.sync_api import expect
from tiny_models import random_llama
from tokenizers import Tokenizer, models, pre_tokenizers

from offline_quantize.api import quantize_checkpoint
from offline_quantize.benchmark.server import Server
from precalib_kernels.backends.registry import default_registry

pytestmark = [pytest.mark.slow, pytest.mark.engine]

KEY = "a key of this test"
API = "/precalib/api/v1"
VOCABULARY = 256
TOKENS = 40
PROMPT = "word3 word1 word4"
PATHS = ("", "/page.css", "/page.js", "/api/v1/about", "/api/v1/report", "/api/v1/backends")
# Counts of tokens that the page has shown, one for each time that it changed.
WATCH = """window.counts = [];
new MutationObserver(() => counts.push(document.querySelectorAll("#answer button").length))
  .observe(document.getElementById("answer"), { childList: true });"""
SHADE = "(token) => token.style.getPropertyValue('--p')"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed llama of two layers with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("served")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCABULARY}
    endless = {"eos_token_id": None, "max_position_embeddings": 256}
    model = random_llama(5, **sizes, **endless, initializer_range=0.2)
    model.save_pretrained(folder / "source")
    words = {f"word{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="word0"
    ).save_pretrained(folder / "source")
    quantize_checkpoint(
        folder / "source", folder / "packed", "balanced-4", activations="none", jobs=1
    )
    return folder / "packed"


@pytest.fixture(scope="module")
def server(packed):
    """`vllm serve` of it, with a key and the page; a file of choices has those of other models."""
    choices = packed.parent / "choices.jsonl"
    other = {"layer": "other.model", "layout_name": "rtn-4", "rank": 0, "backend": "dense"}
    other |= {"asked_for": False, "reasons": {}, "model": "other", "run": "1"}
    choices.write_text(json.dumps(other) + "\n")
    running = Server(
        *("tiny", packed, packed.parent / "log", "--api-key", KEY, "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "4", "--additional-config"),
        json.dumps({"precalib": {"choices_file": str(choices)}}),
        VLLM_PLUGINS="precalib",
        VLLM_COMPUTE_NANS_IN_LOGITS="1",
        TORCHDYNAMO_DISABLE="1",  # else asking for log probabilities compiles the sampler
    )
    try:
        running.wait_until_ready(300)
        yield running
    finally:
        running.stop()


@pytest.fixture
def opened(chromium, server):
    """Opens the page with the key, and keeps what it complains of and asks for."""
    with contextlib.ExitStack() as stack:

        def open_page(width=1280, scheme="light"):
            context = chromium.new_context(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,
                http_credentials={"username": "", "password": KEY},
            )
            stack.callback(context.close)
            page = context.new_page()
            found = SimpleNamespace(page=page, said=[], asked=set())
            page.on("console", lambda message: found.said.append(message.text))
            page.on("pageerror", lambda error: found.said.append(str(error)))
            page.on("request", lambda request: found.asked.add(request.url))
            assert page.goto(f"{server.url}/precalib").status == 200
            expect(page.locator("#weights tbody tr")).not_to_have_count(0)
            return found

        yield open_page


def status(url, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def answer(page):
    page.fill("#prompt", PROMPT)
    page.fill("#max-tokens", str(TOKENS))
    page.click("#send")
    expect(page.locator("#state")).to_contain_text(f"{TOKENS} tokens in ", timeout=120_000)


@pytest.mark.parametrize("path", PATHS)
def test_the_key_is_respected(server, path):
    url = f"{server.url}/precalib{path}"
    assert [status(url), status(url, "wrong"), status(url, KEY)] == [401, 401, 200]


def test_the_table_is_that_of_the_model_and_is_sorted(opened, packed):
    page = opened().page
    manifest = json.loads((packed / "precalib.json").read_text())
    bits = f"{manifest['totals']['bits_per_weight']:.3f}"
    expect(page.locator("#tiles div", has_text="effective bits").locator("dd")).to_have_text(bits)
    rows = page.locator("#weights tbody tr")
    expect(rows).to_have_count(len(manifest["tensors"]))
    errors = [float(row.locator("td").nth(3).inner_text()) for row in rows.all()]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 1
    page.locator("#weights th button", has_text="weight").click()
    names = [row.locator("th").inner_text() for row in rows.all()]
    assert names == sorted(manifest["tensors"])


def test_backends_are_those_of_this_server(opened):
    page = opened().page
    rows = page.locator("#backends tbody tr")
    expect(rows).to_have_count(8)  # of both layers: q with k and v, o, gate with up, down
    names = {row.locator("th").inner_text() for row in rows.all()}
    assert "model.layers.0.self_attn.qkv_proj" in names
    assert "other.model" not in names
    backends = {row.locator("td").nth(2).inner_text() for row in rows.all()}
    assert backends <= {*default_registry().names, "dense"}


def test_an_answer_streams_with_probabilities_and_metrics_move(opened):
    page = opened().page
    tile = page.locator("#live div", has_text=re.compile("^tokens per second")).locator("dd")
    expect(tile).to_have_text("0.0")
    page.evaluate(WATCH)
    page.evaluate(
        """window.rates = [];
        new MutationObserver(() => rates.push(document.querySelector("#live dd").textContent))
          .observe(document.querySelector("#live dd"),
            { childList: true, characterData: true, subtree: true });"""
    )
    answer(page)
    counts = page.evaluate("counts")
    assert counts[-1] == TOKENS
    assert len(set(counts)) > 2  # not all at once
    tokens = page.locator("#answer button")
    shades = [float(token.evaluate(SHADE)) for token in tokens.all()]
    assert all(0 < shade <= 1 for shade in shades)
    assert len(set(shades)) > 1
    tokens.nth(3).hover()
    detail = page.locator("#detail")
    expect(detail).to_contain_text(tokens.nth(3).inner_text().strip())
    expect(detail.locator("li")).to_have_count(5)
    for _ in range(300):  # the page's policy forbids what `wait_for_function` does to wait
        moved = page.evaluate("rates.some((rate) => parseFloat(rate) > 0)")
        if moved:
            break
        page.wait_for_timeout(100)
    assert moved
    nan = page.locator("#live div", has_text="requests with NaN").locator("dd")
    expect(nan).to_have_text("0")
    generated = page.evaluate(f"fetch('{API}/metrics').then((a) => a.json())")["generated_tokens"]
    assert generated >= TOKENS


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_has_no_serious_fault(opened, server, assert_sound, width, scheme):
    found = opened(width, scheme)
    answer(found.page)
    found.page.locator("#answer button").first.focus()
    assert_sound(found, server.url)
