"""The page of `benchmarks/load.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {
    "chat": "streamed chats, read at full speed",
    "slow": "streamed chats, read slowly",
    "leaver": "chats whose client leaves in the middle",
    "malformed": "malformed requests",
    "oversized": "requests longer than the context",
}


def markdown(about: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    """What was sent, what came of it, and on what machine."""
    rows: list[tuple[str, list[str]]] = [
        (f"{text}", [f"{numbers['requests'][kind]:,}" for numbers in models.values()])
        for kind, text in KINDS.items()
    ]
    rows += [
        ("valid requests", [f"{n['valid']:,}" for n in models.values()]),
        ("read to their end", [f"{n['read']:,}" for n in models.values()]),
        ("ended by vLLM's count, without those left", [f"{n['ended']:,}" for n in models.values()]),
        ("HTTP answers 2xx", [f"{n['answered'].get('2xx', 0):,}" for n in models.values()]),
        ("HTTP answers 4xx", [f"{n['answered'].get('4xx', 0):,}" for n in models.values()]),
        ("tokens received", [f"{n['tokens']:,}" for n in models.values()]),
        ("tokens/s", [f"{n['tokens'] / n['seconds']:.1f}" for n in models.values()]),
        (
            "MB in the second third",
            [f"{n['memory_middle_mb']:.0f}" for n in models.values()],
        ),
        ("MB in the last third", [f"{n['memory_last_mb']:.0f}" for n in models.values()]),
        ("faults", ["; ".join(n["faults"]) or "none" for n in models.values()]),
    ]
    minutes = [n.get("memory_by_minute_mb", ()) for n in models.values()]
    if all(minutes):
        told = ("MB of a minute after the first third, least – most", [*map(spread, minutes)])
        rows.insert(-1, told)
    pause = f", each with {about['pause']:g} s on average between two requests"
    pause = pause if about["pause"] else ""
    each = " on each model, one after another" if len(models) > 1 else ""
    lines = [
        "# Soak" if about["pause"] else "# Load",
        "",
        f"{about['clients']} clients at once for {about['minutes']:g} minutes{each}{pause}.",
        "Clients leave in the middle of an answer, read slowly, or send what is malformed or too",
        "long, which has to be refused with a status of 4xx; every other request has to end with a",
        "reason. The server's counts of requests and HTTP answers have to be the clients' own.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in conditions(about)),
        "",
        f"| | {' | '.join(models)} |",
        f"|---|{'--:|' * len(models)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        "MB are the resident size of the server and all of its processes.",
    ]
    return "\n".join(lines) + "\n"


def spread(minutes: Sequence[float]) -> str:
    """Least and most of the minutes after the first third."""
    after = minutes[len(minutes) // 3 :]
    return f"{min(after):.0f} – {max(after):.0f}"


def conditions(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """When, where and how it was measured."""
    settings = [f"`{name}={value}`" for name, value in about["settings"].items()]
    versions = [f"{name} {version}" for name, version in about["versions"].items()]
    return [
        ("date", about["date"]),
        ("commit", f"`{about['commit']}`" if about["commit"] else "not recorded"),
        ("processor", about["processor"]),
        ("versions", ", ".join(versions)),
        ("flags of `vllm serve`", f"`{about['flags']}`" if about["flags"] else "none"),
        ("settings", f"{', '.join(settings) or 'none'}; niceness {about['nice']}"),
        ("load", about["other work"]),
    ]
