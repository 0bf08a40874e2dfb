"""The backends inside vLLM, what users may say about them, and the choice for one layer."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from offline_quantize.planning.options import Options as RecipeOptions
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry, default_registry
from precalib_kernels.errors import ServingError
from vllm_precalib.compat import vllm_names
from vllm_precalib.dense_backend import DenseBackend
from vllm_precalib.mixed_precision_backend import MixedPrecisionBackend

with vllm_names():
    from vllm.config import VllmConfig, get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

logger = init_logger("vllm.precalib")


def plugin_registry() -> BackendRegistry:
    """A new registry of the kernels' own backends and of the two that need vLLM."""
    registry = default_registry()
    registry.register(MixedPrecisionBackend, before="reference")
    registry.register(DenseBackend, before="reference")
    return registry


def describe() -> Iterator[tuple[str, str | None]]:
    """Name of every backend, with the reason why it cannot run a typical layer here, or None."""
    yield from plugin_registry().describe(current_platform.device_type).items()


@dataclasses.dataclass(frozen=True)
class Options:
    """What users say under "precalib" in --additional-config.

    backend:          its name, None for the first that can run.
    int8_activations: whether products are to round activations to 8 bits.
    choices_file:     file that gets the choice for every layer, a line of JSON each.
    against:          address of a server whose model the page compares answers with.
    recipes:          recipes and kept modules of a checkpoint that is quantized while it is loaded.
    """

    backend: str | None = None
    int8_activations: bool = False
    choices_file: Path | None = None
    against: str | None = None
    recipes: RecipeOptions = dataclasses.field(default_factory=RecipeOptions)

    @classmethod
    def parse(cls, additional_config: Any) -> "Options":
        """Read vLLM's additional_config. Raises ServingError for what is not known.

        vLLM hashes additional_config into the key of its compile cache, so two backends never
        share compiled code.
        """
        ours = additional_config.get("precalib", {}) if isinstance(additional_config, dict) else {}
        known = isinstance(ours, dict) and not set(ours) - set(KINDS)
        if (
            not known
            or not all(isinstance(value, KINDS[key]) for key, value in ours.items())
            or ours.get("activations", "int8") != "int8"
            or not str(ours.get("against", "http://")).startswith(("http://", "https://"))
            or not all(isinstance(item, str) for item in _words(ours))
        ):
            raise ServingError(
                f'additional_config: "precalib" is {ours!r}, but only {{"backend": NAME, '
                '"activations": "int8", "choices_file": PATH, "against": URL} is known, and for a '
                'checkpoint that is not packed {"recipe": NAME, "keep": [PATTERN], '
                '"overrides": {PATTERN: NAME}, "head": NAME, "embeddings": NAME}'
            )
        recipes = RecipeOptions(
            ours.get("recipe"),
            overrides=tuple(ours.get("overrides", {}).items()),
            keep=tuple(ours.get("keep", ())),
            head=ours.get("head"),
            embeddings=ours.get("embeddings"),
        )
        file = Path(ours["choices_file"]) if "choices_file" in ours else None
        return cls(ours.get("backend"), "activations" in ours, file, ours.get("against"), recipes)


# Keys under "precalib", and what kind of value each has.
KINDS: Mapping[str, type] = {
    "backend": str,
    "activations": str,
    "choices_file": str,
    "against": str,
    "recipe": str,
    "keep": list,
    "overrides": dict,
    "head": str,
    "embeddings": str,
}
RECIPE_KEYS = ("recipe", "keep", "overrides", "head", "embeddings")


def _words(ours: Mapping[str, Any]) -> Iterator[Any]:
    """What has to be a text inside of lists and objects."""
    yield from ours.get("keep", ())
    yield from ours.get("overrides", {}).values()


@dataclasses.dataclass(frozen=True)
class Run:
    """One start of vLLM with one model, the same for all of its workers.

    model: as vLLM calls it, a folder or an id;  run: differs from start to start.
    """

    model: str
    run: str

    @classmethod
    def of(cls, config: VllmConfig) -> "Run":
        """That of a configuration; data-parallel engines add their rank to its id."""
        return cls(getattr(config.model_config, "model", ""), config.instance_id.split("_dp")[0])


def choose(
    spec: LinearSpec, options: Options, registry: BackendRegistry, where: str, layout_name: str
) -> BackendChoice:
    """The backend for the layer `where`; logged once for each layout, and written to a file.

    layout_name: what the checkpoint calls the layout.

    Raises ServingError, with the reasons, if none can run or the one asked for cannot.
    """
    wanted = options.backend
    if wanted is not None:
        try:
            wanted = registry.resolve(wanted)
        except ServingError as error:
            raise ServingError(
                f'additional_config {{"precalib": {{"backend": "{wanted}"}}}}: {error}'
            ) from error
    try:
        choice = registry.choose(spec, wanted)
    except ServingError as error:
        raise ServingError(f"{where}: {error}") from error
    logger.info_once(
        "precalib computes layout %s with backend %s (%s)",
        layout_name,
        choice.backend.name,
        choice.reason,
    )
    if options.choices_file is not None:
        _append(options.choices_file, choice, where, layout_name)
    return choice


def _append(file: Path, choice: BackendChoice, where: str, layout_name: str) -> None:
    """Add a line to `file`; every rank writes its own, whole, as lines are appended at once.

    Files are used again by later servers, so a line says of which model and which run it is.

    Raises ServingError for a file that cannot be written.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    fields = {"layer": where, "layout_name": layout_name, "rank": rank, **choice.to_dict()}
    fields |= dataclasses.asdict(Run.of(get_current_vllm_config()))
    line = (json.dumps(fields) + "\n").encode()
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
    except OSError as error:
        raise ServingError(
            f'additional_config: "choices_file" {file} cannot be written ({error.strerror})'
        ) from error
