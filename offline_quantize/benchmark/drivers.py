"""One measurement: a load on one server or one engine, driven by vLLM's benchmarks or GuideLLM."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from offline_quantize.benchmark.cases import Case, Measurement
from offline_quantize.benchmark.server import COMMANDS, ServerError, TimeIsUpError, environment
from precalib_kernels.errors import UsageError

SECONDS = 600  # one measurement of a server may take
OFFLINE_SECONDS = 1800  # and of an engine, which is started for it
BATCHES = 5  # whose times `vllm bench latency` takes
Driver = Literal["vllm", "guidellm"]
# Measures a server: its label, its address, what it calls its model, whose tokenizer makes the
# prompts, the load, the round, and how many seconds it may take.
MeasureServer = Callable[[str, str, str, Path, Case, int, float], Measurement]


def vllm() -> str:
    """The command of this environment's vLLM. Raises UsageError if there is none."""
    found = os.environ.get("VLLM") or str(COMMANDS / "vllm")
    if not Path(found).exists():
        raise UsageError("bench needs vLLM in the same environment; see deploy/README.md")
    return found


def guidellm() -> str:
    """GuideLLM's command: of this environment, or else on the path. Raises UsageError."""
    here = COMMANDS / "guidellm"
    found = str(here) if here.exists() else shutil.which("guidellm")
    if not found:
        raise UsageError("there is no guidellm; 'pip install guidellm', or use --driver vllm")
    return found


def driver(name: Driver) -> MeasureServer:
    """What measures a server. Raises UsageError if it is not installed."""
    if name == "guidellm":
        guidellm()
        return measure_with_guidellm
    vllm()
    return measure


def measure(
    label: str,
    address: str,
    model: str,
    tokenizer: Path,
    case: Case,
    round_number: int,
    seconds: float = SECONDS,
) -> Measurement:
    """Put a load on a server by `vllm bench serve`.

    The same round draws the same prompts for every server.

    Raises ServerError if it fails or a request was not answered, TimeIsUpError.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [vllm(), "bench", "serve", "--backend", "openai", "--base-url", address]
        words += ["--model", model, "--tokenizer", str(tokenizer), "--ignore-eos"]
        words += ["--num-prompts", str(case.requests), "--num-warmups", "1"]
        words += ["--max-concurrency", str(case.concurrency)]
        words += ["--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", "99"]
        words += ["--disable-tqdm", "--save-result", "--result-dir", folder]
        words += ["--result-filename", "result.json", *_prompts(case, round_number)]
        _run(words, f"{label}, {case}", "vllm bench serve", seconds)
        fields = json.loads((Path(folder) / "result.json").read_text())
    _check_answered(label, case, int(fields["completed"]))
    return Measurement(
        server=label,
        prompts=case.prompts,
        concurrency=case.concurrency,
        round=round_number,
        seconds=float(fields["duration"]),
        tokens_per_second=float(fields["output_throughput"]),
        answer_tokens=fields["total_output_tokens"] / case.requests,
        first_token_ms=float(fields["median_ttft_ms"]),
        first_token_ms_99=float(fields["p99_ttft_ms"]),
        token_ms=float(fields["median_tpot_ms"]),
        token_ms_99=float(fields["p99_tpot_ms"]),
        answer_ms=float(fields["median_e2el_ms"]),
    )


def measure_with_guidellm(
    label: str,
    address: str,
    model: str,
    tokenizer: Path,
    case: Case,
    round_number: int,
    seconds: float = SECONDS,
) -> Measurement:
    """Put a load on a server by `guidellm run`, version 0.8; else as `measure`."""
    tokens_in, tokens_out = case.tokens
    target = {"target": address, "model": model, "request_format": "/v1/completions"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = [guidellm(), "run", "--disable-console"]
        words += ["--backend", json.dumps({"kind": "openai_http"} | target)]
        words += ["--profile", f"kind=concurrent,streams={case.concurrency}"]
        words += ["--constraint", f"kind=max_requests,count={case.requests}", "--data"]
        words += [f"kind=synthetic_text,prompt_tokens={tokens_in},output_tokens={tokens_out}"]
        words += ["--tokenizer", json.dumps({"kind": "huggingface_auto", "model": str(tokenizer)})]
        words += ["--seed", f"kind=static,value={round_number}"]
        words += ["--output", json.dumps({"kind": "json", "path": str(file)})]
        _run(words, f"{label}, {case}", "guidellm run", seconds)
        (found,) = json.loads(file.read_text())["benchmarks"]
    _check_answered(label, case, int(found["metrics"]["request_totals"]["successful"]))
    metrics = {
        name: value["successful"]
        for name, value in found["metrics"].items()
        if isinstance(value, dict) and isinstance(value.get("successful"), dict)
    }
    first, token = metrics["time_to_first_token_ms"], metrics["inter_token_latency_ms"]
    return Measurement(
        server=label,
        prompts=case.prompts,
        concurrency=case.concurrency,
        round=round_number,
        seconds=float(found["duration"]),
        tokens_per_second=float(metrics["output_tokens_per_second"]["mean"]),
        answer_tokens=float(metrics["output_token_count"]["mean"]),
        first_token_ms=float(first["median"]),
        first_token_ms_99=float(first["percentiles"]["p99"]),
        token_ms=float(token["median"]),
        token_ms_99=float(token["percentiles"]["p99"]),
        answer_ms=1000 * float(metrics["request_latency"]["median"]),
    )


def measure_offline(
    label: str,
    model: Path,
    tokenizer: Path,
    case: Case,
    round_number: int,
    flags: Sequence[str] = (),
) -> Measurement:
    """Start an engine without a server and put a load on it, by `vllm bench throughput` or
    `vllm bench latency`, as the case says.

    flags: for the engine.

    Raises ServerError if it fails, TimeIsUpError after half an hour.
    """
    tokens_in, tokens_out = case.tokens
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = [vllm(), "bench", case.mode, "--model", str(model), "--tokenizer", str(tokenizer)]
        words += ["--output-json", str(file), *flags, "--max-num-seqs", str(case.concurrency)]
        if case.mode == "throughput":
            words += ["--num-prompts", str(2 * case.requests), "--num-warmups", "2"]
            words += _prompts(case, round_number)
        else:
            words += ["--input-len", str(tokens_in), "--output-len", str(tokens_out)]
            words += ["--batch-size", str(case.concurrency), "--num-iters-warmup", "1"]
            words += ["--num-iters", str(BATCHES), "--seed", str(round_number)]
        _run(words, f"{label}, {case}", f"vllm bench {case.mode}", OFFLINE_SECONDS)
        fields = json.loads(file.read_text())
    if case.mode == "throughput":
        seconds, answer_ms = float(fields["elapsed_time"]), None
        speed = fields["num_requests"] * tokens_out / seconds
    else:
        batch = float(fields["percentiles"]["50"])
        seconds, answer_ms = sum(fields["latencies"]), 1000 * batch
        speed = case.concurrency * tokens_out / batch
    return Measurement(
        server=label,
        prompts=case.prompts,
        concurrency=case.concurrency,
        round=round_number,
        mode=case.mode,
        seconds=seconds,
        tokens_per_second=speed,
        answer_tokens=float(tokens_out),
        answer_ms=answer_ms,
    )


def _prompts(case: Case, seed: int) -> list[str]:
    """Options of vLLM's benchmarks for random prompts of the load's length."""
    words = ["--dataset-name", "random", "--random-input-len", str(case.tokens[0])]
    return [*words, "--random-output-len", str(case.tokens[1]), "--seed", str(seed)]


def _run(words: Sequence[str], what: str, command: str, seconds: float) -> None:
    process = subprocess.Popen(
        words,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeIsUpError(f"{what}: not done after {seconds:.0f} s") from None
    finally:  # an engine is a process of its own, which outlives the command that is killed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise ServerError(f"{what}: {command} failed:\n{(errors or out)[-2000:]}")


def _check_answered(label: str, case: Case, completed: int) -> None:
    if completed != case.requests:
        raise ServerError(
            f"{label}, {case}: {completed} of {case.requests} requests were answered; "
            "its log tells why: give it longer contexts, or measure fewer requests at once"
        )
