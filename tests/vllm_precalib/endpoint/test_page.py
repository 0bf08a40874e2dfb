"""The page in a browser: it fits, can be read and used by keyboard, and asks nobody else."""

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import uvicorn
from playwright.sync_api import expect
from prometheus_client import Gauge

pytestmark = pytest.mark.slow

KEY = "a key of this test"


@contextlib.contextmanager
def listening(app):
    """The application on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def opened(chromium, build, choice, tmp_path, registry):
    """Opens the page of a server, and keeps what it complains of and asks for."""
    with contextlib.ExitStack() as stack:

        def open_page(width=1280, scheme="light", keys=(), password=None, **ours):
            file = tmp_path / "choices.jsonl"
            lines = [
                choice(f"model.layers.{i}.<b>x</b>", reasons={"triton": "needs a GPU"})
                for i in range(12)
            ]
            file.write_text("\n".join(lines))
            running = Gauge("vllm:num_requests_running", "", registry=registry)
            running.set(3)
            engine = SimpleNamespace(errored=False)
            served = build(keys, engine=engine, choices_file=str(file), **ours)
            address = stack.enter_context(listening(served.app))
            stack.callback(setattr, engine, "errored", True)
            context = chromium.new_context(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,
                http_credentials={"username": "", "password": password} if password else None,
            )
            stack.callback(context.close)
            page = context.new_page()
            found = SimpleNamespace(page=page, said=[], asked=set(), address=address)
            page.on("console", lambda message: found.said.append(message.text))
            page.on("pageerror", lambda error: found.said.append(str(error)))
            page.on("request", lambda request: found.asked.add(request.url))
            found.answer = page.goto(f"{address}/precalib")
            return found

        yield open_page


def answer(page):
    page.fill("#prompt", "The capital of France")
    page.click("#send")
    expect(page.locator("#state")).to_contain_text("4 tokens in ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_has_no_serious_fault(opened, other_server, assert_sound, width, scheme):
    found = opened(width, scheme, against=other_server.url)
    answer(found.page)
    expect(found.page.locator("#other")).to_be_visible()
    expect(found.page.locator("#weights tbody tr")).to_have_count(5)
    found.page.locator("#answer button").first.focus()
    assert_sound(found, found.address)


def test_text_of_model_files_is_text(opened):
    page = opened().page
    expect(page.locator("#backends")).to_contain_text("model.layers.0.<b>x</b>")
    expect(page.locator("#weights")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("main img, main b").count() == 0


def test_tokens_and_their_alternatives_by_keyboard(opened):
    page = opened().page
    answer(page)
    tokens = page.locator("#answer button")
    expect(tokens).to_have_count(4)
    assert tokens.all_inner_texts() == [" Paris", " is", " <b>", " it"]
    page.locator("#stop").evaluate("(button) => button.closest('form').lastElementChild.focus()")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    detail = page.locator("#detail")
    expect(detail).to_contain_text('" <b>" 75.0 %')
    expect(detail.locator("li").nth(1)).to_have_text('" no" 12.5 %')
    page.keyboard.press("ArrowLeft")
    expect(detail).to_contain_text('" is" 75.0 %')
    reachable = page.locator("#answer button[tabindex='0']")
    expect(reachable).to_have_count(1)  # the tab key does not stop at every token


def test_metrics_move(opened, registry):
    page = opened().page
    tile = page.locator("#live div", has_text="running").locator("dd")
    expect(tile).to_have_text("3")
    registry._names_to_collectors["vllm:num_requests_running"].set(5)
    expect(tile).to_have_text("5")
    assert " " in page.locator("#live polyline").first.get_attribute("points")


def test_a_heading_sorts_and_the_filter_filters(opened):
    page = opened().page
    rows = page.locator("#weights tbody tr")
    errors = [float(row.locator("td").nth(3).inner_text()) for row in rows.all()]
    assert errors == sorted(errors, reverse=True)
    page.locator("#weights th button", has_text="weight").press("Enter")
    names = [row.locator("th").inner_text() for row in rows.all()]
    assert names == sorted(names)
    page.locator("#filter").press_sequentially("UP_proj")
    expect(page.locator("#shown")).to_have_text("2 shown")


def test_a_browser_asks_its_user_for_the_key(opened):
    found = opened(keys=[KEY], password=KEY)
    assert found.answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{found.address}/precalib")
    answer(found.page)


def test_what_is_refused_is_said(opened):
    page = opened().page
    page.fill("#max-tokens", "1000")
    page.fill("#prompt", "x")
    page.click("#send")
    expect(page.locator("#state")).to_have_text("too many tokens")
