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
        (
            "MB of a minute after the first third, least – most",
            [least_and_most(n["memory_by_minute_mb"]) for n in models.values()],
        ),
        ("faults", ["; ".join(n["faults"]) or "none" for n in models.values()]),
    ]
    pause = f", each with {about['pause']:g} s on average between two requests"
    pause = pause if about["pause"] else ""
    lines = [
        "# Load",
        "",
        f"{about['clients']} clients at once for {about['minutes']:g} minutes on each model, one "
        f"after another{pause}. Malformed requests and those that are too long have to be refused "
        "with a status of 4xx; all others have to end with a reason.",
        "",
        f"| | {' | '.join(models)} |",
        f"|---|{'--:|' * len(models)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        "MB are the resident size of the server and all of its processes.",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
    ]
    return "\n".join(lines) + "\n"


def least_and_most(minutes: Sequence[float]) -> str:
    """Of the minutes after the first third."""
    after = minutes[len(minutes) // 3 :]
    return f"{min(after):.0f} – {max(after):.0f}" if after else "–"
