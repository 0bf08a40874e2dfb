"""The model card: README.md of a packed checkpoint, in the form that the Hugging Face Hub reads."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from offline_quantize.checkpoint.atomic_files import (
    CARD,
    MANIFEST,
    read_json,
    write_bytes,
    write_json,
)
from offline_quantize.checkpoint.hub import REPOSITORY
from offline_quantize.checkpoint.manifest import REQUANTIZE_REMEDY, Manifest, read_manifest
from offline_quantize.checkpoint.source import CONFIG, architecture
from offline_quantize.evaluation.result import EvaluationResult, Interval
from offline_quantize.planning.activation_options import describe, describe_tuning
from offline_quantize.report.card_metadata import (
    Provenance,
    is_ours,
    metadata_of,
    read_metadata,
    write_metadata,
)
from offline_quantize.report.evaluations import read_evaluation
from offline_quantize.units import size
from precalib_kernels.errors import FormatError, InputError, OutputError, UsageError

LICENCE_FILE = re.compile(r"(licen[cs]e|notice|use_policy)\b", re.IGNORECASE)
UNKNOWN = "not recorded"


def write_run_card(directory: Path, source: Path) -> None:
    """Write the card of a checkpoint that this process has just made of `source`.

    The metadata of the source's card is carried over, its text is not. Equal runs write the same.
    """
    manifest = read_manifest(directory)
    provenance = Provenance.of_run(source, manifest.run)
    _write(directory, manifest, read_metadata(source / CARD), provenance, ())


def rewrite_card(
    directory: Path,
    *,
    evaluations: Sequence[Path] = (),
    base_model: str | None = None,
    license_id: str | None = None,
    force: bool = False,
) -> None:
    """Write the card of a finished checkpoint anew, for instance with results of an evaluation.

    What an earlier card says of source, licence and versions stays. A README.md that was copied
    from the source gives its metadata, is replaced, and leaves the manifest.

    evaluations: results of `precalib eval --json` on this checkpoint.
    base_model:  id of the source on the Hub;  license_id: its licence, as the Hub names it.
    force:       whether a README.md that somebody else wrote may be replaced.

    Raises OutputError for such a README.md, InputError for results that are not of this checkpoint,
    UsageError for an impossible id.
    """
    if base_model and not REPOSITORY.fullmatch(base_model):
        raise UsageError(f"--base-model {base_model!r} is no id on the Hub such as org/name")
    manifest = read_manifest(directory)
    results = [_own(path, directory, manifest) for path in evaluations]
    card, recorded = directory / CARD, CARD in manifest.files
    if card.exists() and not (force or recorded or is_ours(card)):
        raise OutputError(f"{card}: was not written by precalib; add --force to replace it")
    metadata = read_metadata(card)
    provenance = Provenance.of_card(metadata)
    if license_id:
        metadata = {k: v for k, v in metadata.items() if not k.startswith("license")}
        metadata["license"] = license_id
    if base_model:
        provenance = dataclasses.replace(provenance, source=base_model)
    if recorded:
        files = {name: record for name, record in manifest.files.items() if name != CARD}
        manifest = manifest.model_copy(update={"files": files})
        write_json(directory / MANIFEST, manifest.to_json())
    _write(directory, manifest, metadata, provenance, results)


def _own(path: Path, directory: Path, manifest: Manifest) -> EvaluationResult:
    result = read_evaluation(path, directory).result
    if result.bits_per_weight != manifest.totals.bits_per_weight:
        raise InputError(
            f"{path}: is of a checkpoint with {result.bits_per_weight:.4f} effective bits, and "
            f"{directory} has {manifest.totals.bits_per_weight:.4f}; give results of this one"
        )
    return result


def _write(
    directory: Path,
    manifest: Manifest,
    origin: Mapping[str, Any],
    provenance: Provenance,
    results: Sequence[EvaluationResult],
) -> None:
    digest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    metadata = metadata_of(origin, provenance, digest)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown: `_plain` and `_code` take the place of HTML's escapes
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("card.md.j2").render(
        metadata=write_metadata(metadata),
        digest=digest,
        format_version=manifest.format_version,
        texts=list(_texts(results)),
        tasks=list(_tasks(results)),
        **_contents(manifest),
        **_origin(directory, metadata, provenance, manifest),
    )
    write_bytes(directory / CARD, re.sub(r"\n{3,}", "\n\n", text).encode())


def _contents(manifest: Manifest) -> dict[str, Any]:
    """What is packed, and how."""
    totals, run = manifest.totals, manifest.run
    given = [*(("--override", text) for text in run.overrides), *(("--keep", t) for t in run.keep)]
    labels: dict[str, list[tuple[int, float]]] = {}
    for weight in manifest.tensors.values():
        count = weight.shape[0] * weight.shape[1]
        labels.setdefault(weight.recipe, []).append((count, count * weight.bits_per_weight))
    head = f" --head {run.head}" if run.head else ""
    embeddings = f" --embeddings {run.embeddings}" if run.embeddings else ""
    transform = f" --transform {run.transform}" if run.transform else ""
    return {
        "bits": f"{totals.bits_per_weight:.3f}",
        "version": _plain(manifest.precalib),
        "recipe": _code(f"{run.recipe}{head}{embeddings}{transform}"),
        "options": _code(" ".join(f"{option} {shlex.quote(value)}" for option, value in given)),
        "inputs": _plain(
            (f"known from {describe(run.activations)}" if run.activations else "not used")
            + describe_tuning(run.tuned)
        ),
        "weights": f"{totals.weights:,} weights in {len(manifest.tensors):,} matrices",
        "packed_size": size(totals.stored_bytes),
        "source_size": size(totals.source_bytes),
        "unquantized": f"{len(manifest.unquantized):,} tensors, {size(totals.unquantized_bytes)}",
        "error": f"{totals.mean_relative_error:.5f}",
        "layouts": [
            {
                "name": _code(label),
                "matrices": f"{len(parts):,}",
                "weights": f"{sum(count for count, _ in parts):,}",
                "bits": f"{sum(bits for _, bits in parts) / sum(n for n, _ in parts):.3f}",
            }
            for label, parts in labels.items()
        ],
    }


def _origin(
    directory: Path,
    metadata: Mapping[str, Any],
    provenance: Provenance,
    manifest: Manifest,
) -> dict[str, str]:
    """What the model was made of, in words."""
    source = provenance.source
    config = read_json(directory / CONFIG, FormatError, REQUANTIZE_REMEDY)
    named = source.partition("/")[2] if source else architecture(config)
    link = f"[{_plain(source)}](https://huggingface.co/{source})" if source else ""
    licence = metadata.get("license_name") or metadata.get("license") or ""
    licence = " ".join(licence) if isinstance(licence, list) else licence
    address = metadata.get("license_link")
    files = [name for name in manifest.files if LICENCE_FILE.match(Path(name).name)]
    return {
        "title": _plain(f"{named}, {manifest.run.recipe}"),
        "original": link or f"A model ({_plain(named)})",
        "source": link or UNKNOWN,
        "revision": f"`{_code(provenance.revision)}`" if provenance.revision else UNKNOWN,
        "versions": ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in provenance.versions.items())
        or UNKNOWN,
        "licence": _code(licence),
        "licence_link": _plain(address) if isinstance(address, str) else "",
        "licence_files": ", ".join(f"`{_code(name)}`" for name in files),
    }


def _texts(results: Sequence[EvaluationResult]) -> Iterator[Mapping[str, str]]:
    for result in results:
        if text := result.text:
            original = text.original_perplexity, text.original_perplexity_interval
            yield {
                "of": _plain(text.of),
                "tokens": f"{text.tokens:,}",
                "kl": _with_interval(text.kl, text.kl_interval, ".4f"),
                "agreement": _with_interval(text.agreement, text.agreement_interval, ".1%"),
                "perplexity": _with_interval(text.perplexity, text.perplexity_interval, ".2f"),
                "original": _with_interval(*original, ".2f"),
            }


def _tasks(results: Sequence[EvaluationResult]) -> Iterator[Mapping[str, str]]:
    for result in results:
        for name, task in (result.tasks or {}).items():
            original = task.original_accuracy, task.original_accuracy_interval
            yield {
                "name": _plain(Path(name).name),
                "questions": f"{task.questions:,}",
                "accuracy": _with_interval(task.accuracy, task.accuracy_interval, ".1%"),
                "original": _with_interval(*original, ".1%"),
                "same": f"{task.same_choice:.1%}",
            }


def _with_interval(value: float, interval: Interval, form: str) -> str:
    low, high = interval
    return f"{value:{form}} [{low:{form}}–{high:{form}}]"


def _plain(text: str) -> str:
    """Text from a model or a file as plain words of Markdown, on one line."""
    words = " ".join(text.encode(errors="replace").decode().split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", words)


def _code(text: str) -> str:
    """The same for a code span in a table."""
    return " ".join(text.encode(errors="replace").decode().split()).translate({96: "'", 124: "¦"})
