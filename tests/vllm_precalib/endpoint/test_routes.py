"""The routes of the endpoint plugin: who may use them, what they say, and what they send along."""

import asyncio
import base64
import contextlib
import html.parser
import importlib.metadata
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import Counter, Gauge, Histogram

from vllm_precalib.endpoint import PrecalibEndpoint, routes

ROOT = Path(__file__).resolve().parents[3]
KEY = "a key of this test"
API = "/precalib/api/v1"
PATHS = sorted({route.path.replace("{name}", "page.js") for route in routes.router.routes})
BODY = {"prompt": "The capital of France"}


def basic(password, user=""):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def ask(client, path, **headers):
    if path.endswith("/generate"):
        return client.post(path, json=BODY, headers=headers)
    return client.get(path, headers=headers)


class Engine:
    """An engine that stops after some looks at it."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def errored(self):
        self.looks -= 1
        return self.looks < 0


def test_it_is_what_vllm_loads():
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["vllm.endpoint_plugins"]["precalib"]
    point = importlib.metadata.EntryPoint("precalib", value, "vllm.endpoint_plugins")
    plugin = point.load()()
    assert isinstance(plugin, PrecalibEndpoint)
    assert isinstance(plugin, EndpointPlugin)


def test_all_routes_are_known():
    assert len(PATHS) == 9
    assert f"{API}/generate" in PATHS


@pytest.mark.parametrize("path", PATHS)
def test_every_route_wants_the_key(build, path):
    served = build([KEY, "another"], engine=Engine(1))
    for value in ("", "Bearer", "Bearer wrong", KEY, basic("wrong"), "Basic ???", f"Digest {KEY}"):
        answer = ask(served.client, path, **({"Authorization": value} if value else {}))
        assert answer.status_code == 401, value
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "served" not in answer.text
    assert served.standin.asked == []
    for value in (f"Bearer {KEY}", f"bearer {KEY}", basic(KEY), basic("another", "me")):
        assert ask(served.client, path, Authorization=value).status_code == 200, value


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_strict(build, path):
    answer = ask(build(engine=Engine(1)).client, path)
    assert answer.status_code == 200
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", PATHS)
def test_other_sites_pages_may_not_use_it(build, path):
    client = build(engine=Engine(1)).client
    for site in ("cross-site", "same-site"):
        assert ask(client, path, **{"Sec-Fetch-Site": site}).status_code == 403
    assert ask(client, path, **{"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_link_to_the_page_can_be_followed(build):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert build().client.get("/precalib", headers=headers).status_code == 200


def test_a_form_of_another_site_does_not_ask_the_model(build):
    served = build()
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"Content-Type": kind} if kind else {}
        answer = served.client.post(
            f"{API}/generate", content=json.dumps(BODY).encode(), headers=headers
        )
        assert answer.status_code == 422
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.json()["error"]["code"] == 422
    assert served.standin.asked == []


@pytest.mark.parametrize("path", PATHS)
def test_before_it_is_ready_it_says_so(build, path):
    assert ask(build(ready=False).client, path).status_code == 503


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.addresses, self.inline, self.tag = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        for name, value in attributes:
            if name in ("src", "href", "action"):
                self.addresses.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append(name)

    def handle_data(self, data):
        if self.tag in ("script", "style") and data.strip():
            self.inline.append(data)


def test_the_page_loads_its_own_files_and_nothing_else(build):
    client = build().client
    page = Page(client.get("/precalib").text)
    assert page.inline == []
    assert sorted(page.addresses) == ["data:,", "precalib/page.css", "precalib/page.js"]
    for address in page.addresses[:]:
        if not address.startswith("data:"):
            answer = client.get(f"/{address}")
            assert answer.status_code == 200
            assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in client.get("/precalib/page.js").text
    assert client.get("/precalib/routes.py").status_code == 404
    assert client.get("/precalib/..%2fbackends.py").status_code == 404


def test_the_report_is_that_of_the_manifest(build, packed):
    manifest = json.loads((packed / "precalib.json").read_text())
    report = build().client.get(f"{API}/report").json()
    assert report["model"] == "served"
    assert report["recipe"] == "rtn-4"
    assert report["effective_bits"] == manifest["totals"]["bits_per_weight"]
    assert {w["module"]: w["relative_error"] for w in report["weights"]} == {
        module: entry["relative_error"] for module, entry in manifest["tensors"].items()
    }
    up = next(w for w in report["weights"] if w["module"] == "model.layers.1.mlp.up_proj")
    assert (up["layer"], up["kind"], up["shape"]) == (1, "mlp.up_proj", [128, 128])
    (names,) = report["unquantized"].values()
    assert names == list(manifest["kept"])


@pytest.mark.parametrize("text", [None, "{}", "[]", "no JSON", '{"totals": {}}', "\xff"])
def test_a_model_without_a_manifest_has_no_report(build, tmp_path, text):
    if text is not None:
        (tmp_path / "precalib.json").write_bytes(text.encode("latin-1"))
    answer = build(model=tmp_path).client.get(f"{API}/report")
    assert answer.status_code == 404
    assert "no manifest" in answer.json()["error"]["message"]


def test_a_model_of_the_hub_is_looked_up_in_its_cache(build, packed, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file, **_: str(packed / file) if name == "org/model" else None,
    )
    assert build(model="org/model").client.get(f"{API}/report").status_code == 200


def test_backends_are_the_last_recorded_choices(build, choice, tmp_path):
    file = tmp_path / "choices.jsonl"
    lines = [choice("a"), choice("b"), choice("a", rank=1), '{"half', "[]", "\xff"]
    file.write_text("\n".join([*lines, choice("a", "dense")]), "latin-1")
    found = build(choices_file=str(file)).client.get(f"{API}/backends").json()
    assert found["missing"] is None
    assert [(c["layer"], c["rank"], c["backend"]) for c in found["layers"]] == [
        ("b", 0, "x86"),
        ("a", 1, "x86"),
        ("a", 0, "dense"),
    ]
    assert found["layers"][0]["reasons"] == {"x86": "no"}
    assert found["layers"][0].keys() == {
        *("layer", "layout_name", "rank", "backend", "asked_for", "reasons")
    }


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        # an earlier model and an earlier start with this one, with other layers
        ([{"layer": "x", "model": "other"}, {"layer": "y", "run": "1"}, {"layer": "a"}], "a"),
        # a server that was started later with another model
        ([{"layer": "a"}, {"layer": "x", "model": "other", "run": "3"}], "a"),
        # a draft model, which is part of this one
        ([{"layer": "a"}, {"layer": "draft", "run": "3"}], "a draft"),
        # one of several API servers: the engine's start has another name
        ([{"layer": "x", "run": "0"}, {"layer": "a", "run": "1"}], "a"),
        ([{"layer": "x", "model": "other"}], ""),
        ([{"layer": "x", "model": None}], ""),  # as versions wrote that did not say
    ],
)
def test_choices_of_other_models_and_earlier_starts_are_not_shown(
    build, choice, tmp_path, lines, shown
):
    file = tmp_path / "choices.jsonl"
    file.write_text("\n".join(choice(**line) for line in lines))
    found = build(choices_file=str(file)).client.get(f"{API}/backends").json()
    assert " ".join(c["layer"] for c in found["layers"]) == shown


def test_without_recorded_choices_it_says_how_to_get_them(build):
    assert '"choices_file"' in build().client.get(f"{API}/backends").json()["missing"]


def test_recorded_choices_that_are_gone_are_named(build, tmp_path):
    gone = build(choices_file=str(tmp_path / "gone")).client.get(f"{API}/backends").json()
    assert "cannot be read" in gone["missing"]


@pytest.fixture
def engine_metrics(registry):
    """vLLM's metrics that the page reads, under their own names."""
    labels = ["engine"]
    made = SimpleNamespace(
        generated=Counter("vllm:generation_tokens", "", labels, registry=registry),
        prompt=Counter("vllm:prompt_tokens", "", labels, registry=registry),
        nan=Counter("vllm:corrupted_requests", "", labels, registry=registry),
        running=Gauge("vllm:num_requests_running", "", labels, registry=registry),
        waiting=Gauge("vllm:num_requests_waiting", "", labels, registry=registry),
        cache=Gauge("vllm:kv_cache_usage_perc", "", labels, registry=registry),
        first=Histogram("vllm:time_to_first_token_seconds", "", labels, registry=registry),
        gap=Histogram("vllm:inter_token_latency_seconds", "", labels, registry=registry),
    )
    made.cache.labels("0").set(0.5)
    made.cache.labels("1").set(0.25)
    made.running.labels("0").set(2)
    made.running.labels("1").set(1)
    made.generated.labels("0").inc(100)
    made.first.labels("0").observe(9)
    made.nan.labels("0").inc(0)
    return made


def test_metrics_now(build, engine_metrics):
    live = build().client.get(f"{API}/metrics").json()
    assert (live["running"], live["waiting"], live["generated_tokens"]) == (3, 0, 100)
    assert live["kv_cache_share"] == 0.375
    assert live["nan_requests"] == 0
    assert live["generated_per_second"] is None


def test_metrics_that_are_missing_are_no_error(build):
    live = build().client.get(f"{API}/metrics").json()
    assert (live["running"], live["nan_requests"]) == (0, None)


def test_events_have_rates_since_the_last_one(build, engine_metrics, monkeypatch):
    monkeypatch.setattr(routes, "SECONDS_BETWEEN", 0.2)

    class Busy(Engine):
        @property
        def errored(self):
            engine_metrics.generated.labels("0").inc(50)
            engine_metrics.first.labels("0").observe(0.5)
            engine_metrics.first.labels("0").observe(1.5)
            engine_metrics.gap.labels("0").observe(0.125)
            return super().errored

    answer = build(engine=Busy(3)).client.get(f"{API}/events")
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert len(events) == 3  # it ends with the engine
    assert events[0]["generated_per_second"] is None
    for event in events[1:]:
        assert 60 < event["generated_per_second"] < 300  # 50 tokens in a fifth of a second
        assert event["first_token_seconds"] == pytest.approx(1.0)
        assert event["token_seconds"] == pytest.approx(0.125)


def test_places_are_looked_for_and_taken_in_one_step():
    places = routes.Places(2)
    with contextlib.ExitStack() as stack:
        assert [stack.enter_context(places.one()) for _ in range(4)] == [True, True, False, False]
        assert places.free == 0
    assert places.free == 2


async def ask_at_once(app, count, path, body=b""):
    """The statuses of so many requests whose handlers all run before the first answer begins."""
    begun, gone = asyncio.Semaphore(0), asyncio.Event()
    statuses = []

    async def client():
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            if message := next(given, None):
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append((message["status"], dict(message["headers"])))
                begun.release()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST" if body else "GET", "path": path}
        scope |= {"query_string": b"", "headers": headers, "http_version": "1.1"}
        await app(scope, receive, send)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(client())
        for _ in range(count):
            await begun.acquire()
        gone.set()
    return statuses


@pytest.mark.parametrize(
    ("path", "limit", "kind"),
    [("events", "MOST_WATCHERS", "watchers"), ("generate", "MOST_PROMPTS", "prompts")],
)
def test_streams_at_once_are_limited(build, monkeypatch, path, limit, kind):
    monkeypatch.setattr(routes, limit, 3)
    served = build()
    served.standin.endless = True
    body = json.dumps(BODY).encode() if path == "generate" else b""
    answers = asyncio.run(ask_at_once(served.app, 12, f"{API}/{path}", body))
    assert sorted(status for status, _ in answers) == [200] * 3 + [503] * 9
    for _, headers in answers:
        assert headers[b"content-security-policy"].startswith(b"default-src 'none'")
    assert getattr(served.app.state.precalib_limits, kind).free == 3


def test_a_client_that_goes_before_its_answer_gives_its_place_back(build):
    served = build()
    limits = served.app.state.precalib_limits

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError  # as servers do for a connection that is closed

    async def values():
        yield limits  # never sent

    async def leave():
        with contextlib.suppress(Exception):
            await routes.LimitedStream(values(), limits.prompts)(
                {"type": "http", "method": "GET"}, gone, send
            )

    asyncio.run(leave())
    assert limits.prompts.free == routes.MOST_PROMPTS


def test_prometheus_gets_bits_and_backends(build, choice, tmp_path, registry):
    file = tmp_path / "choices.jsonl"
    file.write_text("\n".join([choice("a"), choice("b"), choice("a", rank=1)]))
    report = build(choices_file=str(file)).client.get(f"{API}/report").json()
    value = registry.get_sample_value
    assert value("precalib_effective_bits", {"recipe": "rtn-4"}) == report["effective_bits"]
    assert value("precalib_layers", {"layout": "rtn-4", "backend": "x86"}) == 2


def test_the_schema_describes_every_route(build):
    client = build().client
    schema = client.get(f"{API}/openapi.json").json()
    described = {path.removeprefix(API) for path in schema["paths"]}
    assert described == {"/about", "/report", "/backends", "/metrics", "/events", "/generate"}
    models = {"About", "Report", "Weight", "Backends", "Live", "Prompt", "Token", "Comparison"}
    assert models <= set(schema["components"]["schemas"])
    assert client.get("/openapi.json").json()["paths"].keys() >= schema["paths"].keys()


def test_about(build):
    about = build(against="http://127.0.0.1:1").client.get(f"{API}/about").json()
    assert about["model"] == "served"
    assert about["against"] == "http://127.0.0.1:1"
    assert about["vllm"].startswith("0.")
