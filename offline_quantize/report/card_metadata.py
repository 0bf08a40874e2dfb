"""The metadata of a model card: what the Hub reads between the two lines "---" of a README.md."""

import dataclasses
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from offline_quantize.checkpoint.manifest import RunRecord

OURS = "precalib"  # the entry by which a card of ours is known
BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
SNAPSHOT = re.compile(r"models--([\w.-]+)--([\w.-]+)/snapshots/([0-9a-f]{40})")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What stays true of a quantized model; results and examples of the original are not its own.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
CARRIED_WITHOUT_SOURCE = ("base_model", "base_model_relation")
TAGS = ("precalib", "quantized")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a packed checkpoint comes from, as its card records it.

    source:   id of the source on the Hub; None where that is not known.
    revision: commit of the source; None where that is not known.
    versions: of the software that made it, by name; empty where that is not known.
    """

    source: str | None = None
    revision: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_run(cls, source: Path, run: RunRecord) -> "Provenance":
        """That of a run which this process has just done on a checkpoint."""
        return cls(*_origin(source), _versions(run))

    @classmethod
    def of_card(cls, metadata: Mapping[str, Any]) -> "Provenance":
        """What an earlier card of ours recorded; empty if there was none."""
        ours = metadata.get(OURS)
        ours = ours if isinstance(ours, Mapping) else {}
        versions = ours.get("versions")
        versions = versions if isinstance(versions, Mapping) else {}
        return cls(
            _text(ours.get("source")),
            _text(ours.get("source_revision")),
            {str(k): str(v) for k, v in versions.items()},
        )


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty for a missing file, and for one without readable metadata."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return {}
    block = BLOCK.match(text)
    try:
        found = yaml.safe_load(block[1]) if block else None
    except (yaml.YAMLError, ValueError, RecursionError):  # a wrong date is a ValueError
        return {}
    return found if isinstance(found, dict) else {}


def is_ours(path: Path) -> bool:
    """Whether a file is a card that precalib wrote."""
    return recorded_digest(path) is not None


def recorded_digest(path: Path) -> str | None:
    """The manifest's sha256 that a card of ours records; None for any other file."""
    ours = read_metadata(path).get(OURS)
    return _text(ours.get("manifest_sha256")) if isinstance(ours, Mapping) else None


def metadata_of(
    origin: Mapping[str, Any], provenance: Provenance, manifest_digest: str
) -> dict[str, Any]:
    """Metadata of the card, as the Hub defines it, with an entry of our own.

    origin:          metadata of the source's card, or of an earlier card of ours.
    manifest_digest: sha256 of the manifest, hexadecimal.
    """
    made: dict[str, Any] = {}
    if provenance.source:
        made |= {"base_model": provenance.source, "base_model_relation": "quantized"}
    else:
        made |= _carried(origin, CARRIED_WITHOUT_SOURCE)
    made |= _carried(origin, CARRIED)
    tags = made.get("tags", [])
    tags = [tags] if isinstance(tags, str) else tags
    made["tags"] = [*(tag for tag in tags if tag not in TAGS), *TAGS]
    made["library_name"] = "vllm"
    made[OURS] = {
        "manifest_sha256": manifest_digest,
        **({"source": provenance.source} if provenance.source else {}),
        **({"source_revision": provenance.revision} if provenance.revision else {}),
        **({"versions": dict(provenance.versions)} if provenance.versions else {}),
    }
    return made


def write_metadata(metadata: Mapping[str, Any]) -> str:
    """The block that begins a card."""
    text = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n"


def _carried(origin: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The entries of these names that are a text or a list of texts."""
    found: dict[str, Any] = {}
    for name in names:
        value = origin.get(name)
        if name == "language" and value is False:
            value = "no"  # Norwegian, which YAML takes for a truth value
        if isinstance(value, list):
            value = [text for entry in value if (text := _text(entry))]
        elif not _text(value):
            continue
        if value:
            found[name] = value
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _origin(source: Path) -> tuple[str | None, str | None]:
    """Id and commit of a source, as the Hub's own tools leave them on disk."""
    if found := SNAPSHOT.search(source.absolute().as_posix()):
        return f"{found[1]}/{found[2]}", found[3]
    note = source / ".cache" / "huggingface" / "download" / "config.json.metadata"
    try:
        commit = note.read_text(errors="replace").partition("\n")[0].strip()
    except OSError:
        commit = ""
    return None, commit if COMMIT.fullmatch(commit) else None


def _versions(run: RunRecord) -> dict[str, str]:
    """Versions of what a run's bytes depend on."""
    made = {name: version(name) for name in ("torch", "numpy", "safetensors")}
    if run.activations is not None:
        made["transformers"] = version("transformers")
    return {"precalib": version("vllm-precalib"), **made, "python": platform.python_version()}
