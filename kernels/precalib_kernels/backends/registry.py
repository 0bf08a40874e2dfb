"""Which backends there are, best first, and which of them computes a layer.

To add a backend, write its class (`base.Backend`) in a folder of its own and name it in
`default_registry`. An engine with backends of its own registers them in its own registry.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.errors import ServingError
from precalib_kernels.format.layout import Layout

FORMER_NAMES = {"native": "x86", "stock": "vllm_mixed_precision"}  # still understood
LOWER = "lower priority"


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """Which backend computes a layer, and why none of the others.

    spec:      the layer.
    backend:   the class that was chosen; `make` gives the instance for the layer.
    reasons:   for every other backend by name, best first, why it was not chosen.
    asked_for: whether the user named the backend.
    """

    spec: LinearSpec
    backend: type[Backend]
    reasons: Mapping[str, str]
    asked_for: bool = False

    def make(self) -> Backend:
        """The chosen backend, for one layer."""
        return self.backend(self.spec)

    @property
    def reason(self) -> str:
        """Why this backend, what spoke against better ones, what to expect; one line of a log."""
        refused = [f"{name}: {why}" for name, why in self.reasons.items() if why != LOWER]
        why = "asked for" if self.asked_for else "; ".join(["first that can run", *refused])
        why += "; activations in 8 bits, as asked for" * self.spec.int8_activations
        expected = self.backend.expectation(self.spec)
        return why if expected is None else f"{why}; {expected}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "spec": self.spec.to_dict(),
            "backend": self.backend.name,
            "reasons": dict(self.reasons),
            "asked_for": self.asked_for,
        }


class BackendRegistry:
    """The backends that a layer can be computed by, in the order in which they are tried."""

    def __init__(self, backends: Iterable[type[Backend]] = ()) -> None:
        self._backends: list[type[Backend]] = []
        for backend in backends:
            self.register(backend)

    def __iter__(self) -> Iterator[type[Backend]]:
        return iter(self._backends)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all backends, best first."""
        return tuple(backend.name for backend in self)

    def register(self, backend: type[Backend], before: str | None = None) -> None:
        """Add a backend: tried last, or right before the one called `before`.

        Raises ValueError for a name that is taken, or a `before` that is not.
        """
        if backend.name in self.names:
            raise ValueError(f"there is a backend '{backend.name}' already")
        place = len(self._backends) if before is None else self.names.index(before)
        self._backends.insert(place, backend)

    def resolve(self, name: str) -> str:
        """Today's name of the backend that was or is called `name`.

        Raises ServingError if there is no such backend.
        """
        name = FORMER_NAMES.get(name, name)
        if name not in self.names:
            raise ServingError(f"there is no such backend; choose one of {', '.join(self.names)}")
        return name

    def choose(self, spec: LinearSpec, wanted: str | None = None) -> BackendChoice:
        """The backend called `wanted`, or else the first that can run.

        Raises ServingError with the reasons if the one that is wanted does not exist or cannot
        run, or if none can.
        """
        name = None if wanted is None else self.resolve(wanted)
        chosen: type[Backend] | None = None
        reasons: dict[str, str] = {}
        for backend in self:
            if name is not None and backend.name != name:
                reasons[backend.name] = f"{name} was asked for"
            elif chosen is not None:
                reasons[backend.name] = LOWER
            elif reason := backend.can_run(spec):
                reasons[backend.name] = reason
            else:
                chosen = backend
        if chosen is None:
            told = {name: reasons[name]} if name is not None else reasons
            refused = "; ".join(f"{name}: {reason}" for name, reason in told.items())
            raise ServingError(f"no backend can run this layer ({refused})")
        return BackendChoice(spec, chosen, reasons, asked_for=name is not None)

    def reasons(self, spec: LinearSpec) -> dict[str, str | None]:
        """For every backend by name, best first: None if it can run, or why it cannot."""
        return {backend.name: backend.can_run(spec) for backend in self}

    def describe(self, device: str) -> dict[str, str | None]:
        """`reasons` for a typical layer: 4 bits, groups of 128, bfloat16.

        device: torch's name for the kind of device, "cpu" or "cuda".
        """
        layout = Layout(bits=4, group_size=128)
        return self.reasons(LinearSpec(layout, 4096, (4096,), torch.bfloat16, device))


def default_registry() -> BackendRegistry:
    """A new registry of the backends that need no inference engine."""
    # imported here because backends define kernels of operators, which few readers of this
    # module want
    from precalib_kernels.backends.arm.backend import ArmBackend
    from precalib_kernels.backends.reference import ReferenceBackend
    from precalib_kernels.backends.triton.backend import TritonBackend
    from precalib_kernels.backends.x86.backend import X86Backend

    return BackendRegistry((X86Backend, ArmBackend, TritonBackend, ReferenceBackend))
