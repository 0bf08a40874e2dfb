"""What is measured: loads, and what a measurement says."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from offline_quantize.checkpoint.records import Record

Mode = Literal["serve", "throughput", "latency"]
MODES: tuple[Mode, ...] = ("serve", "throughput", "latency")
# Tokens in and out; "brief" is for quick looks.
LENGTHS = {"brief": (32, 32), "short": (32, 64), "long": (512, 64)}
PROMPTS = ("short", "long")
CONCURRENCIES = (1, 4, 16, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A load: prompts of random tokens, so many requests at once, answers of a fixed length.

    mode: "serve" for a server and its clients; "throughput" for an engine without a server, whose
          requests all wait from the beginning; "latency" for such an engine and a batch at a time.
    """

    prompts: str
    concurrency: int
    mode: Mode = "serve"

    @property
    def requests(self) -> int:
        """How many in all: twice what is at work at once, and at least four."""
        return max(4, 2 * self.concurrency)

    @property
    def tokens(self) -> tuple[int, int]:
        """In each prompt, and in each answer."""
        return LENGTHS[self.prompts]

    def __str__(self) -> str:
        many = {
            "serve": f"{self.concurrency} at once",
            "throughput": f"{self.concurrency} at once, no server",
            "latency": f"a batch of {self.concurrency}, no server",
        }
        return f"{self.prompts} prompts, {many[self.mode]}"


def cases(
    prompts: Sequence[str], concurrencies: Sequence[int], modes: Sequence[Mode] = ("serve",)
) -> Iterator[Case]:
    """The matrix, mode by mode, small loads first; throughput with the largest number only."""
    for mode in modes:
        numbers = sorted(set(concurrencies))
        for concurrency in numbers[-1:] if mode == "throughput" else numbers:
            for name in prompts:
                yield Case(name, concurrency, mode)


class Measurement(Record):
    """What one server or engine did under one load in one round.

    tokens_per_second: generated, of all requests together.
    answer_tokens:     generated per request, a mean.
    first_token_ms, token_ms, answer_ms: medians over requests of the time to first token, the time
        per token after it, and the time of the whole answer; None where that is not measured.
    *_99: 99th percentiles.
    """

    server: str
    prompts: str
    concurrency: int
    round: int
    seconds: float
    tokens_per_second: float
    answer_tokens: float
    mode: Mode = "serve"
    first_token_ms: float | None = None
    first_token_ms_99: float | None = None
    token_ms: float | None = None
    token_ms_99: float | None = None
    answer_ms: float | None = None

    @property
    def case(self) -> Case:
        """The load."""
        return Case(self.prompts, self.concurrency, self.mode)
