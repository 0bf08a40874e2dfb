"""One measurement: a load on one server, driven by `vllm bench serve`."""

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_quantize.benchmark.server import COMMANDS, ServerError, environment
from offline_quantize.checkpoint.records import Record

SHORT, LONG = (32, 64), (512, 64)  # tokens in and out
LENGTHS = {"short": SHORT, "long": LONG}
CONCURRENCIES = (1, 4, 16, 64)
SECONDS = 600  # one measurement may take


@dataclasses.dataclass(frozen=True)
class Case:
    """A load: prompts of random tokens, so many requests at once, answers of a fixed length."""

    prompts: str
    concurrency: int

    @property
    def requests(self) -> int:
        """How many in all: twice what is at work at once, and at least four."""
        return max(4, 2 * self.concurrency)

    @property
    def tokens(self) -> tuple[int, int]:
        """In each prompt, and in each answer."""
        return LENGTHS[self.prompts]

    def __str__(self) -> str:
        return f"{self.prompts} prompts, {self.concurrency} at once"


class Measurement(Record):
    """What one server did under one load in one round.

    tokens_per_second: generated, of all requests together.
    first_token_ms, token_ms: medians over requests: time to first token, time per token after it.
    *_99: 99th percentiles.
    """

    server: str
    prompts: str
    concurrency: int
    round: int
    seconds: float
    tokens_per_second: float
    first_token_ms: float
    first_token_ms_99: float
    token_ms: float
    token_ms_99: float

    @property
    def case(self) -> Case:
        """The load."""
        return Case(self.prompts, self.concurrency)


def cases(prompts: tuple[str, ...], concurrencies: tuple[int, ...]) -> Iterator[Case]:
    """The matrix, small loads first."""
    for concurrency in sorted(concurrencies):
        for name in prompts:
            yield Case(name, concurrency)


def measure(
    label: str, address: str, model: str, tokenizer: Path, case: Case, round_number: int
) -> Measurement:
    """Put a load on the server at `address`, which calls its model `model`.

    The same round draws the same prompts for every server.

    Raises ServerError if `vllm bench serve` fails, takes too long, or a request was not answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [os.environ.get("VLLM") or str(COMMANDS / "vllm"), "bench", "serve"]
        words += ["--backend", "openai", "--base-url", address, "--model", model]
        words += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--ignore-eos"]
        words += ["--random-input-len", str(case.tokens[0])]
        words += ["--random-output-len", str(case.tokens[1])]
        words += ["--num-prompts", str(case.requests), "--num-warmups", "1"]
        words += ["--max-concurrency", str(case.concurrency), "--seed", str(round_number)]
        words += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"]
        words += ["--disable-tqdm", "--save-result", "--result-dir", folder]
        words += ["--result-filename", "result.json"]
        try:
            done = subprocess.run(
                words, env=environment(), capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ServerError(f"{label}, {case}: not done after {SECONDS} s") from None
        if done.returncode:
            end = (done.stderr or done.stdout)[-2000:]
            raise ServerError(f"{label}, {case}: vllm bench serve failed:\n{end}")
        fields = json.loads((Path(folder) / "result.json").read_text())
    return _measurement(label, case, round_number, fields)


def _measurement(label: str, case: Case, round_number: int, fields: Any) -> Measurement:
    if fields["completed"] != case.requests:
        raise ServerError(
            f"{label}, {case}: {fields['completed']} of {case.requests} requests were answered; "
            "give the server longer contexts, or measure fewer requests at once"
        )
    return Measurement(
        server=label,
        prompts=case.prompts,
        concurrency=case.concurrency,
        round=round_number,
        seconds=float(fields["duration"]),
        tokens_per_second=float(fields["output_throughput"]),
        first_token_ms=float(fields["median_ttft_ms"]),
        first_token_ms_99=float(fields["p99_ttft_ms"]),
        token_ms=float(fields["median_tpot_ms"]),
        token_ms_99=float(fields["p99_tpot_ms"]),
    )
