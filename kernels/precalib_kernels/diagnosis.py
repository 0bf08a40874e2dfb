"""What `precalib doctor` finds, in a form that every layer can produce."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

State = Literal["ok", "missing", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state:  "ok"; "missing" for what must be mended before precalib works here; "note" for a fact
            that is neither.
    remedy: what to do about it, as the end of a sentence; None where nothing need be done.
    """

    name: str
    state: State
    text: str
    remedy: str | None = None


def backend_findings(refusals: Mapping[str, str | None]) -> Iterator[Finding]:
    """A finding for every backend; refusals: why each cannot run here, None if it can."""
    for name, reason in refusals.items():
        yield Finding(f"backend {name}", "note" if reason else "ok", reason or "can run")
