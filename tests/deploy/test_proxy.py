"""The proxy as Caddy runs it, before a stand-in of vLLM: who gets in, and to what."""

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import fake_vllm
import pytest

CADDYFILE = Path(__file__).resolve().parents[2] / "deploy" / "compose" / "Caddyfile"
KEY = "0123456789abcdef"
OPEN = {"Authorization": f"Bearer {KEY}"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def caddy():
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("caddy", path=places)
    assert program, "caddy is not installed; run: make install"
    return program


class Proxy:
    """Caddy on a free port, with a key or without."""

    def __init__(self, folder, key):
        self.server = fake_vllm.serve(fake_vllm.Model())
        self.port = free_port()
        variables = {
            "PRECALIB_SITE": f"https://localhost:{self.port}",
            "PRECALIB_SERVER": f"127.0.0.1:{self.server.server_port}",
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        variables |= {"PRECALIB_API_KEY": key} if key else {}
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            [caddy(), "run", "--config", CADDYFILE, "--adapter", "caddyfile"],
            env=os.environ | variables,
            stdout=self.log,
            stderr=self.log,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                self.ask("GET", "/v1/models")
                return
            except OSError:
                assert self.process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        pytest.fail((folder / "log").read_text())

    def connect(self):
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection("localhost", self.port, timeout=20, context=trusting)

    def ask(self, method, path, headers=None, body=None):
        """Status and text; the path goes out as it is."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def stop(self):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    running = Proxy(tmp_path_factory.mktemp("caddy"), KEY)
    yield running
    running.stop()


def test_the_file_is_valid_and_formatted(tool, tmp_path):
    homes = {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    tool("caddy", "validate", "--config", CADDYFILE, "--adapter", "caddyfile", **homes)
    assert "\n+" not in tool("caddy", "fmt", "--diff", CADDYFILE)


def test_the_key_opens(proxy):
    status, text = proxy.ask("GET", "/v1/models", OPEN)
    assert status == 200
    assert json.loads(text)["data"][0]["id"] == "m"


@pytest.mark.parametrize(
    "value",
    [None, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Basic {KEY}"],
)
def test_nothing_else_opens(proxy, value):
    status, text = proxy.ask("GET", "/v1/models", {"Authorization": value} if value else {})
    assert status == 401
    assert json.loads(text)["error"]["code"] == 401


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Bearer {$PRECALIB_API_KEY}"])
def test_without_a_key_nobody_enters(tmp_path_factory, value):
    running = Proxy(tmp_path_factory.mktemp("caddy"), None)
    try:
        assert running.ask("GET", "/v1/models", {"Authorization": value})[0] == 401
    finally:
        running.stop()


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/health",
        "/invocations",
        "/tokenize",
        "/precalib",
        "/docs",
        "/v1/load_lora_adapter",
        "/v1/models/../../metrics",
        "/v1/models/%2e%2e/%2e%2e/metrics",
        "//metrics",
        "/v1/../metrics",
        "/",
    ],
)
def test_no_other_route_can_be_reached(proxy, path):
    assert proxy.ask("GET", path, OPEN)[0] == 404
    assert proxy.ask("DELETE", "/v1/models", OPEN)[0] == 404


def test_a_request_that_is_too_large_is_refused(proxy):
    body = json.dumps({"model": "m", "prompt": "x" * (9 << 20), "max_tokens": 1})
    try:
        status, _ = proxy.ask("POST", "/v1/completions", OPEN, body)
    except (ConnectionError, ssl.SSLError):  # cut off while it was being sent
        return
    assert status == 413


def test_tokens_are_passed_on_as_they_come(proxy):
    connection = proxy.connect()
    asked = {"model": "m", "prompt": "x", "max_tokens": 4000, "stream": True}
    begun = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(asked), OPEN)
    answer = connection.getresponse()
    first = answer.readline()
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["text"] == " Paris"
    assert time.monotonic() - begun < 20  # the whole answer takes minutes
    connection.close()
    assert KEY not in Path(proxy.log.name).read_text()
