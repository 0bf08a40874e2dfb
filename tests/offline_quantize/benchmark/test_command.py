"""`precalib bench` before a stand-in of vLLM: rounds, results, going on, and what is refused."""

import subprocess
import sys
import time
from pathlib import Path

import fake_vllm
import psutil
import pytest

from offline_quantize.benchmark import command, drivers, rounds
from offline_quantize.benchmark.cases import Case, Measurement, cases
from offline_quantize.benchmark.results import About, Results, markdown, paired, rows
from offline_quantize.benchmark.rounds import Journal, Plan, run
from offline_quantize.benchmark.server import ServerError, TimeIsUpError, alive
from offline_quantize.benchmark.targets import Target


def running(pid):
    try:
        return alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    for name in ("vllm", "guidellm"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("VLLM", str(tmp_path / "vllm"))
    monkeypatch.setattr(drivers, "COMMANDS", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
    return tmp_path


def read(out):
    """The results, as the types that they have."""
    return Results.model_validate_json((out / "bench.json").read_text())


SMALL = ("--concurrency", "1,4", "--prompts", "short", "--rounds", 2, "--out", "out")


@pytest.mark.slow
def test_two_models_are_measured_in_rounds(vllm, precalib):
    ran = precalib("bench", "fast", "--against", "slow", *SMALL)
    assert ran.code == 0, ran.err
    assert "1 of 8: round 1, short prompts, 1 at once, fast" in ran.out
    assert "round 2, short prompts, 1 at once, slow" in ran.out
    assert "s left" in ran.out
    found = read(vllm / "out")
    assert [(row.case, row.server) for row in found.rows] == [
        (Case("short", 1), "slow"),
        (Case("short", 1), "fast"),
        (Case("short", 4), "slow"),
        (Case("short", 4), "fast"),
    ]
    assert len(found.measurements) == 8
    one = found.rows[1]
    assert one.tokens_per_second == 101.5
    assert one.answer_ms == pytest.approx((64000 / 101 + 64000 / 102) / 2)
    assert one.answer_tokens == 64
    assert one.ratio.mean == pytest.approx(2)
    assert one.ratio.pairs == 2
    assert found.about.servers == ["slow", "fast"]
    assert found.about.versions["vllm-precalib"]
    assert "| short prompts, 4 at once | fast | 2 | 401.5 |" in (vllm / "out/bench.md").read_text()
    assert (vllm / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")

    again = precalib("bench", "fast", "--against", "slow", *SMALL)  # all is there
    assert again.code == 0, again.err
    assert "starting" not in again.out
    more = precalib("bench", "fast", "--against", "slow", *SMALL, "--serve-flags=--fault deaf")
    assert "is of another run" in more.sentence


@pytest.mark.slow
def test_a_running_server_is_measured_and_left_running(vllm, precalib):
    server = fake_vllm.serve(fake_vllm.Model())
    address = f"http://127.0.0.1:{server.server_port}"
    ran = precalib("bench", "fast", "--against", f"{address}/", "--quick", "--out", "out")
    assert ran.code == 0, ran.err
    found = read(vllm / "out")
    assert found.about.servers == [address, "fast"]
    assert len(found.measurements) == 8
    assert {m.prompts for m in found.measurements} == {"brief"}
    assert precalib("bench", "fast", "--against", address, "--out", "out").code == 1  # other loads
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_engines_without_a_server_are_measured_when_the_servers_have_ended(vllm, precalib):
    server = fake_vllm.serve(fake_vllm.Model())
    address = f"http://127.0.0.1:{server.server_port}"
    modes = ("--modes", "latency,throughput,serve")
    ran = precalib(
        *("bench", "fast", "--against", "old=slow", "--against", f"there={address}/v1"),
        *(*SMALL, *modes),
    )
    server.shutdown()
    server.server_close()
    assert ran.code == 0, ran.err
    found = read(vllm / "out")
    order = [m.mode for m in found.measurements]
    assert order == ["serve"] * 12 + ["throughput"] * 4 + ["latency"] * 8
    assert {m.server for m in found.measurements[12:]} == {"old", "fast"}  # no URL
    row = {(row.case.mode, row.case.concurrency, row.server): row for row in found.rows}
    fast = row["throughput", 4, "fast"]  # 16 answers of 64 tokens in 1/2 s and in 1 s
    assert fast.tokens_per_second == pytest.approx((2048 + 1024) / 2)
    assert (fast.token_ms, fast.answer_ms, fast.ratio.mean) == (None, None, pytest.approx(2))
    batch = row["latency", 4, "old"]  # a batch takes 1 s and 2 s
    assert batch.answer_ms == pytest.approx(1500)
    assert batch.tokens_per_second == pytest.approx((4 * 64 + 4 * 32) / 2)
    text = (vllm / "out" / "bench.md").read_text()
    assert "| short prompts, a batch of 4, no server | old | 2 | 192.0 |  |  | 1500 |  |" in text


@pytest.mark.slow
def test_guidellm_measures_servers(vllm, precalib):
    ran = precalib("bench", "fast", "--against", "slow", *SMALL, "--driver", "guidellm")
    assert ran.code == 0, ran.err
    found = read(vllm / "out")
    assert found.about.driver == "guidellm"
    slow, fast = found.rows[:2]
    assert (slow.tokens_per_second, fast.tokens_per_second) == (50, 100)
    assert (fast.first_token_ms, fast.token_ms, fast.answer_ms) == (5, 10, 640)
    assert (fast.answer_tokens, found.measurements[0].first_token_ms_99) == (64, 10)


def test_without_guidellm_it_says_so(vllm, precalib, monkeypatch):
    (vllm / "guidellm").unlink()
    monkeypatch.setenv("PATH", str(vllm))
    ran = precalib("bench", "fast", "--driver", "guidellm")
    assert "there is no guidellm; 'pip install guidellm'" in ran.sentence


@pytest.mark.slow
def test_any_command_that_serves_is_started_and_stopped(vllm, precalib, monkeypatch):
    monkeypatch.setenv("BENCH_ENDS", "1")  # as servers do that know no ignore_eos
    command = f"{sys.executable} {fake_vllm.__file__} serve x.gguf --fault 'no health'"
    ran = precalib("bench", "fast", "--against", f"llama.cpp={command} --port {{port}}", *SMALL)
    assert ran.code == 0, ran.err
    assert read(vllm / "out").about.servers == ["llama.cpp", "fast"]
    assert "stopped" in (vllm / "out" / "server-llama.cpp.log").read_text()
    text = (vllm / "out" / "bench.md").read_text()
    assert "- llama.cpp, short prompts, 1 at once: answers ended after 32 of 64 tokens" in text


@pytest.mark.slow
def test_a_command_that_ends_or_is_not_there_is_an_error(vllm, precalib):
    missing = precalib("bench", "fast", "--against", "a=/nowhere/llama-server --port {port}")
    assert "a: /nowhere/llama-server cannot be started (No such file or directory)" in missing.err
    ended = precalib("bench", "fast", "--against", "a=sh -c 'echo no model; exit 3' {port}")
    assert "a ended with exit code 3" in ended.err
    assert "no model" in ended.err


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("models/x/", Target("x", folder=Path("models/x"))),
        ("bf16=models/x", Target("bf16", folder=Path("models/x"))),
        ("a=b", Target("a=b", folder=Path("a=b"))),  # there is such a folder
        ("http://h:1/v1/", Target("http://h:1", address="http://h:1")),
        ("W4A16=https://h", Target("W4A16", address="https://h")),
        (
            "llama.cpp=llama-server -m 'my model.gguf' --port {port}",
            Target(
                "llama.cpp", command=["llama-server", "-m", "my model.gguf", "--port", "{port}"]
            ),
        ),
    ],
)
def test_what_is_measured_is_a_folder_an_address_or_a_command(tmp_path, monkeypatch, text, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert Target.parse(text) == target


def test_the_matrix():
    every = list(cases(["short", "long"], [4, 1, 4], ["serve", "throughput"]))
    assert every == [
        *(Case("short", 1), Case("long", 1), Case("short", 4), Case("long", 4)),
        *(Case("short", 4, "throughput"), Case("long", 4, "throughput")),
    ]


@pytest.mark.slow
def test_a_quick_run_ends_in_time_with_what_is_there(vllm, precalib, monkeypatch):
    monkeypatch.setenv("BENCH_HANGS", "2")  # in the second round
    monkeypatch.setattr(command, "QUICK_END_SECONDS", 12.0)
    quick = ("bench", "fast", "--against", "slow", "--quick", "--out", "out")
    begun = time.monotonic()
    ran = precalib(*quick)
    assert time.monotonic() - begun < 40
    assert ran.code == 0, ran.err
    assert "out of time in the middle of a measurement; run it again to go on" in ran.out
    assert len(read(vllm / "out").measurements) == 4
    monkeypatch.delenv("BENCH_HANGS")
    monkeypatch.setattr(command, "QUICK_END_SECONDS", 165.0)
    assert precalib(*quick).code == 0
    assert len(read(vllm / "out").measurements) == 8
    monkeypatch.setattr(command, "QUICK_END_SECONDS", 0.0)  # nothing at all
    assert "was not ready after" in precalib(*quick[:-1], "other").err


@pytest.mark.slow
def test_requests_that_are_lost_and_a_crash_are_errors(vllm, precalib, monkeypatch):
    monkeypatch.setenv("BENCH_LOSES", "1")
    ran = precalib("bench", "fast", *SMALL)
    assert "fast, short prompts, 1 at once: 3 of 4 requests were answered" in ran.err
    monkeypatch.delenv("BENCH_LOSES")
    monkeypatch.setenv("BENCH_CRASHES", "1")
    ran = precalib("bench", "slow", *SMALL[:-1], "crash")
    assert ran.code == 1
    assert "vllm bench serve failed" in ran.err
    assert "out of luck" in ran.err


@pytest.mark.slow
def test_a_signal_stops_the_servers(vllm):
    command = [sys.executable, "-m", "offline_quantize.cli.main", "bench", "fast", "--out", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        lines = iter(running.stdout.readline, "")
        assert any("1 of " in line for line in lines)  # the server is ready
        (server,) = [
            child
            for child in psutil.Process(running.pid).children(recursive=True)
            if child.cmdline()[2] == "serve"
        ]
        running.terminate()
        assert running.wait(60) == 143
    assert not alive(server)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concurrency", "1,x"), "'1,x' is no list of numbers"),
        (("--concurrency", "0"), "numbers of requests above 0"),
        (("--prompts", "medium"), "there are no medium prompts; choose from brief, short, long"),
        (("--modes", "serve,bulk"), "'bulk' is no mode; choose from serve, throughput, latency"),
        (("--against", "llama-server --port {port}"), "has no name; write NAME=COMMAND"),
        (("--against", "fast"), "two servers would be called the same: fast, fast"),
        (("--against", "http://127.0.0.1:9"), "is no server that can be measured"),
    ],
)
def test_what_cannot_be_measured_is_refused(vllm, precalib, options, message):
    assert message in precalib("bench", "fast", "--out", "out", *options).sentence


def test_without_vllm_it_says_so(vllm, precalib, monkeypatch):
    monkeypatch.setenv("VLLM", str(vllm / "gone"))
    assert "bench needs vLLM" in precalib("bench", "fast").sentence


def measurement(server="a", number=1, speed=100.0, concurrency=1):
    return Measurement(
        server=server,
        prompts="short",
        concurrency=concurrency,
        round=number,
        seconds=1.0,
        tokens_per_second=speed,
        first_token_ms=10.0,
        first_token_ms_99=20.0,
        token_ms=5.0,
        token_ms_99=6.0,
        answer_tokens=64.0,
        answer_ms=300.0,
    )


def test_every_round_begins_with_another_server():
    plan = Plan(["a", "b"], [Case("short", 1)], 3)
    assert "".join(server for _, _, server in plan.steps()) == "baabba"


def test_what_runs_already_is_measured_as_a_server_only():
    plan = Plan(["u", "b"], [Case("short", 1, "latency"), Case("short", 1)], 1, None, {"u"})
    assert [(case.mode, server) for _, case, server in plan.steps()] == [
        ("latency", "b"),
        ("serve", "b"),
        ("serve", "u"),
    ]


def test_time_counts_from_the_beginning_and_is_told(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: clock[0])
    plan = Plan(["a", "b"], [Case("short", 1)], 3, seconds=600)
    said = []

    def prepare(case):
        clock[0] += 100

    def measure(server, case, number):
        clock[0] += 50
        return measurement(server, number)

    done = run(plan, Journal(tmp_path / "journal", {}), measure, said.append, prepare, began=60.0)
    # begun at 60; each takes 150 with its preparation, and the last would begin at 650
    assert len(done) == 3
    assert said[0] == "1 of 6: round 1, short prompts, 1 at once, b"
    assert said[1] == "2 of 6: round 1, short prompts, 1 at once, a, about 4 min left"
    assert said[-1] == "out of time with 3 measurements left; run it again"


def test_a_run_ends_in_time_and_goes_on_later(tmp_path):
    plan = Plan(["a", "b"], [Case("short", 1)], 2, seconds=1e9)
    said, done = [], []

    def measure(server, case, number):
        done.append((number, server))
        if len(done) == 3:
            raise KeyboardInterrupt
        return measurement(server, number)

    file = tmp_path / "new" / "journal"
    with pytest.raises(KeyboardInterrupt):
        run(plan, Journal(file, {"x": 1}), measure, said.append)
    assert len(Journal(file, {"x": 1}).measurements) == 2
    late = Plan(plan.servers, plan.cases, 2, seconds=-1)
    assert len(run(late, Journal(file, {"x": 1}), measure, said.append)) == 2
    assert said[-1] == "out of time with 2 measurements left; run it again"
    assert len(run(plan, Journal(file, {"x": 1}), measure, said.append)) == 4
    assert sorted(done) == [(1, "a"), (1, "b"), (2, "a"), (2, "a"), (2, "b")]


@pytest.mark.parametrize(("end", "error"), [("wait", TimeIsUpError), ("exit 3", ServerError)])
def test_nothing_that_a_benchmark_started_outlives_it(tmp_path, end, error):
    """Like vLLM's engine, which is a process of its own."""
    engine = tmp_path / "engine"
    words = ["bash", "-c", f"sleep 600 </dev/null &>/dev/null & echo $! >'{engine}'; {end}"]
    with pytest.raises(error):
        drivers._run(words, "a", "vllm bench latency", 1.0)
    deadline = time.monotonic() + 30
    while running(int(engine.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("cut", "left"), [(1, 1), (200, 0)])
def test_a_line_that_was_not_finished_is_measured_again(tmp_path, cut, left):
    file = tmp_path / "journal"
    journal = Journal(file, {"x": 1})
    journal.add(measurement("a", 1))
    whole = file.read_bytes()
    journal.add(measurement("b", 1))
    file.write_bytes(file.read_bytes()[:-cut] if left else b'{"x"')
    assert len(Journal(file, {"x": 1}).measurements) == left
    assert file.read_bytes() == (whole if left else whole[: whole.index(b"\n") + 1])


def test_a_damaged_journal_is_an_error(tmp_path):
    (tmp_path / "journal").write_text('{"x": 1}\n{"server": 1}\n')
    with pytest.raises(Exception, match="is damaged; remove it and measure again"):
        Journal(tmp_path / "journal", {"x": 1})


def test_a_paired_ratio_has_an_interval():
    assert paired({1: 2.0}, {2: 1.0}) is None
    one = paired({1: 3.0}, {1: 2.0})
    assert (one.mean, one.low, one.pairs) == (pytest.approx(1.5), None, 1)
    three = paired({1: 2.0, 2: 4.0, 3: 8.0, 4: 1.0}, {1: 2.0, 2: 2.0, 3: 2.0})
    assert three.mean == pytest.approx(2)
    # logarithms 0, ln 2, 2 ln 2: mean ln 2, deviation ln 2, t = 4.303 with 2 degrees of freedom
    assert three.high / three.mean == pytest.approx(2 ** (4.303 / 3**0.5), rel=1e-3)
    assert three.low * three.high == pytest.approx(three.mean**2)
    assert str(three) == f"2.00 [{three.low:.2f}–{three.high:.2f}]"
    constant = paired({1: 2.0, 2: 2.0}, {1: 1.0, 2: 1.0})
    assert (constant.low, constant.high) == (pytest.approx(2), pytest.approx(2))


def test_rows_are_medians():
    speeds = {"a": (100.0, 300.0, 200.0), "b": (50.0, 50.0, 60.0)}
    every = [measurement(s, n, v) for s, vs in speeds.items() for n, v in enumerate(vs, 1)]
    first, second = rows(every, ["a", "b"])
    assert (first.tokens_per_second, first.ratio) == (200.0, None)
    assert second.tokens_per_second == 50.0
    assert second.ratio.pairs == 3
    about = About(
        servers=["a", "b"],
        prompts={},
        driver="vllm",
        flags="",
        processor="P",
        versions={},
        commit=None,
    )
    text = markdown(about, [first, second])
    assert "| short prompts, 1 at once | a | 3 | 200.0 | 10 | 5.0 | 300 |  |" in text
    assert "- processor: P" in text
