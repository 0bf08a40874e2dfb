"""The engine's own metrics as the page shows them, and two of ours beside them."""

import collections
import dataclasses
import time

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge

from vllm_precalib.endpoint.schemas import Backends, Live, Report

EFFECTIVE_BITS = "precalib_effective_bits"
LAYERS = "precalib_layers"
GENERATED, PROMPT = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
FIRST_TOKEN, TOKEN = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
CACHE, NAN = "vllm:kv_cache_usage_perc", "vllm:corrupted_requests_total"
WANTED = {GENERATED, PROMPT, RUNNING, WAITING, CACHE, NAN}
WANTED |= {f"{name}_{part}" for name in (FIRST_TOKEN, TOKEN) for part in ("sum", "count")}


@dataclasses.dataclass(frozen=True)
class Sample:
    """The metrics at a moment, summed over engines; `engines` is how many there are."""

    at: float
    values: dict[str, float]
    engines: int

    @classmethod
    def take(cls, registry: CollectorRegistry | None = None) -> "Sample":
        """Read them as they are now."""
        if registry is None:
            from vllm.v1.metrics.prometheus import get_prometheus_registry

            registry = get_prometheus_registry()
        values: dict[str, float] = collections.defaultdict(float)
        engines = 0
        for family in registry.collect():
            for sample in family.samples:
                if sample.name in WANTED:
                    values[sample.name] += sample.value
                    engines += sample.name == CACHE
        return cls(time.time(), dict(values), engines)

    def live(self, before: "Sample | None" = None) -> Live:
        """What to show, with rates since `before`."""
        value = self.values.get
        shown = Live(
            at=self.at,
            running=int(value(RUNNING, 0)),
            waiting=int(value(WAITING, 0)),
            kv_cache_share=value(CACHE, 0.0) / max(1, self.engines),
            generated_tokens=int(value(GENERATED, 0)),
            nan_requests=int(self.values[NAN]) if NAN in self.values else None,
        )
        if before is None or self.at <= before.at:
            return shown

        def grown(name: str) -> float:
            return max(0.0, value(name, 0.0) - before.values.get(name, 0.0))

        def mean(name: str) -> float | None:
            count = grown(f"{name}_count")
            return grown(f"{name}_sum") / count if count else None

        seconds = self.at - before.at
        shown.generated_per_second = grown(GENERATED) / seconds
        shown.prompt_per_second = grown(PROMPT) / seconds
        shown.first_token_seconds = mean(FIRST_TOKEN)
        shown.token_seconds = mean(TOKEN)
        return shown


def publish(
    report: Report | None, backends: Backends, registry: CollectorRegistry | None = None
) -> None:
    """Let Prometheus read the effective bits, and how many layers each backend computes.

    registry: None for that of the process, which `/metrics` shows.
    """
    registry = registry or prometheus_client.REGISTRY
    if report is not None:
        bits = Gauge(
            EFFECTIVE_BITS,
            "Bits per packed weight of the served model, all stored bytes counted.",
            ["recipe"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        bits.labels(report.recipe).set(report.effective_bits)
    counts = collections.Counter((c.layout_name, c.backend) for c in backends.layers if not c.rank)
    if counts:
        layers = Gauge(
            LAYERS,
            "Packed layers that a backend computes, on the first rank.",
            ["layout", "backend"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        for (layout, backend), count in counts.items():
            layers.labels(layout, backend).set(count)
