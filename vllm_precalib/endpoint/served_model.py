"""The model that the server serves: its manifest, and the backends of its layers."""

import contextlib
import dataclasses
import functools
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from offline_quantize.checkpoint.atomic_files import MANIFEST
from offline_quantize.checkpoint.manifest import Manifest, WeightRecord, read_manifest
from precalib_kernels.errors import PrecalibError
from vllm_precalib.backends import Options, Run
from vllm_precalib.endpoint.schemas import (
    BackendOfLayer,
    Backends,
    RecordedChoice,
    Report,
    Weight,
)
from vllm_precalib.endpoint.security import api_keys

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
RUN = {"model", "run"}  # fields of a recorded choice that say whose it is
NO_FILE = (
    "The choices are not recorded. Start the server with --additional-config "
    '\'{"precalib": {"choices_file": "FILE"}}\' to see them here.'
)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What the routes know of the server.

    name:     what requests call the model;  directory: where its files are, None if unknown.
    api_keys: of vLLM; empty if requests need none.
    options:  what users say under "precalib" in --additional-config.
    engine:   tells whether it still runs.
    run:      what its workers record as the model and the run; None if there is no engine.
    """

    name: str
    directory: Path | None
    api_keys: tuple[str, ...]
    options: Options
    engine: "EngineClient | None" = None
    run: Run | None = None

    @classmethod
    def of(cls, engine: "EngineClient | None", args: Namespace) -> "ServedModel":
        """The model of a server that was started with these arguments."""
        names = args.served_model_name or [args.model]
        names = [names] if isinstance(names, str) else names
        return cls(
            names[0],
            _directory(args.model, getattr(args, "revision", None)),
            api_keys(args),
            Options.parse(getattr(args, "additional_config", None) or {}),
            engine,
            Run.of(engine.vllm_config) if engine is not None else None,
        )

    @property
    def running(self) -> bool:
        """Whether the engine is there; streams that have no end of their own end with it."""
        return self.engine is None or not self.engine.errored

    def report(self) -> Report | None:
        """What the manifest says; None for a model that precalib has not packed."""
        return self._report

    @functools.cached_property
    def _report(self) -> Report | None:
        try:
            return _report_of(read_manifest(self.directory), self.name) if self.directory else None
        except PrecalibError:
            return None  # not there, damaged, or of another version

    def backends(self) -> Backends:
        """The choice for each layer of this run of the server, ranks apart."""
        file = self.options.choices_file
        if file is None:
            return Backends(layers=[], missing=NO_FILE)
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError as error:
            return Backends(layers=[], missing=f"{file}: cannot be read ({error.strerror}).")
        found: dict[tuple[str, int], BackendOfLayer] = {}
        for choice in self._of_this_run(list(_choices(lines))):
            found.pop((choice.layer, choice.rank), None)
            found[choice.layer, choice.rank] = BackendOfLayer(**choice.model_dump(exclude=RUN))
        return Backends(layers=list(found.values()))

    def _of_this_run(self, choices: list[RecordedChoice]) -> list[RecordedChoice]:
        """Those of this model from the first of this run on.

        Several API servers have runs of their own, which no worker records; then it is the last
        run with this model. A draft model may have another run than the model it is a part of, so
        later runs stay.
        """
        if self.run is None:
            return []
        ours = [choice for choice in choices if choice.model == self.run.model]
        runs = [choice.run for choice in ours]
        wanted = self.run.run if self.run.run in runs else next(reversed(runs), None)
        return ours[runs.index(wanted) :] if wanted is not None else []


def _choices(lines: list[str]) -> Iterator[RecordedChoice]:
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line, or another program's
            yield RecordedChoice.model_validate_json(line)


def served(state: Any) -> ServedModel:
    """The model of an application's state. Raises HTTPException 503 before there is one."""
    model = getattr(state, "precalib", None)
    if not isinstance(model, ServedModel):
        raise HTTPException(503, "The server is not ready.")
    return model


def _directory(model: str, revision: str | None) -> Path | None:
    """Where the files of a model are; for an id of the Hub, what its cache holds."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, MANIFEST, revision=revision)
    except ValueError:  # no id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _report_of(manifest: Manifest, name: str) -> Report:
    totals = manifest.totals
    unquantized: dict[str, list[str]] = {}
    for tensor, reason in manifest.unquantized.items():
        unquantized.setdefault(reason, []).append(tensor)
    return Report(
        model=name,
        recipe=manifest.run.recipe,
        precalib=manifest.precalib,
        effective_bits=totals.bits_per_weight,
        packed_weights=totals.weights,
        packed_bytes=totals.stored_bytes,
        source_bytes=totals.source_bytes,
        unquantized_bytes=totals.unquantized_bytes,
        relative_error=totals.mean_relative_error,
        weights=[_weight(module, record) for module, record in manifest.tensors.items()],
        unquantized=unquantized,
    )


def _weight(module: str, record: WeightRecord) -> Weight:
    match = LAYER.search(module)
    return Weight(
        module=module,
        layer=int(match[1]) if match else None,
        kind=module[match.end() :] if match else module,
        recipe=record.recipe,
        shape=record.shape,
        bits=record.bits_per_weight,
        relative_error=record.relative_error,
        salient_share=record.salient_share,
    )
