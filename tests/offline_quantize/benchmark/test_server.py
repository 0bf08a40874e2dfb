import sys

import psutil
import pytest

from offline_quantize.benchmark import server
from offline_quantize.benchmark.server import Server, ServerError

# Stands in for `vllm`: a child in the group, a child in a session of its own, deaf to SIGTERM.
FAKE_VLLM = f"""#!{sys.executable}
import http.server, signal, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
if "die" in sys.argv:
    print("loading weights")
    sys.exit("out of weights")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])
subprocess.Popen(["sleep", "600"], start_new_session=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    vllm = tmp_path / "vllm"
    vllm.write_text(FAKE_VLLM)
    vllm.chmod(0o755)
    monkeypatch.setattr(server, "COMMANDS", tmp_path)
    monkeypatch.setattr(server, "STOP_SECONDS", 3)  # of a busy machine
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not matter
    return tmp_path


def test_the_way_round_proxies_leaves_what_the_caller_has_set(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    found = server.environment()
    assert (found["NO_PROXY"], found["no_proxy"]) == ("example.org,127.0.0.1", "127.0.0.1")


def test_stop_leaves_no_process(commands):
    running = Server("model", commands / "model", commands / "log")
    running.wait_until_ready(30)
    family = psutil.Process(running.process.pid).children(recursive=True)
    assert len(family) == 2
    running.stop()
    assert running.process.returncode is not None
    assert not [process for process in family if server.alive(process)]
    running.stop()  # a second time is harmless


def test_death_is_reported_with_the_log(commands):
    running = Server("model", commands / "model", commands / "log", "die")
    message = r"(?s)vllm serve model ended with exit code 1; .*log:\nloading.*\nout of weights"
    with pytest.raises(ServerError, match=message):
        running.wait_until_ready(30)
    running.stop()


def test_waiting_has_an_end(commands, monkeypatch):
    monkeypatch.setattr(Server, "_healthy", lambda _: False)
    running = Server("model", commands / "model", commands / "log")
    with pytest.raises(ServerError, match="was not ready after 0 s"):
        running.wait_until_ready(0)
    running.stop()
