"""What `precalib doctor` finds, in a form that every layer can produce."""

import dataclasses
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
