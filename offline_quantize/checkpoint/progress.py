"""What long work tells about itself while it goes on."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run, possibly from several threads."""

    def begin(self, name: str) -> None:
        """A tensor or file is being worked on."""

    def advance(self, nbytes: int) -> None:
        """So many source bytes are done."""


class NullProgress:
    """Progress that is not shown."""

    def begin(self, name: str) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""
