"""`precalib push`: a packed checkpoint to the Hugging Face Hub."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from offline_quantize.checkpoint.atomic_files import CARD, MANIFEST
from offline_quantize.checkpoint.hub import REPOSITORY
from offline_quantize.checkpoint.manifest import read_manifest
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.commands.verify import verify
from offline_quantize.report.card_metadata import recorded_digest
from precalib_kernels.errors import OutputError, PrecalibError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push(
    directory: Path,
    repository: str,
    progress: Progress,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    api: "HfApi | None" = None,
) -> str:
    """Upload a packed checkpoint in one commit; returns the address of the commit.

    The files of the manifest, the manifest and the card are uploaded, and nothing else. They are
    verified first. A repository that does not exist is made.

    repository: "org/name".
    private:    whether a new repository is private.
    branch:     made if it does not exist; None for the main one.
    api:        access to the Hub; None for the one of HF_ENDPOINT and the user's own token.

    Raises UsageError for an impossible name, OutputError for a checkpoint with a fault, a card of
    another checkpoint, a repository that holds other weights, and whatever the Hub refuses.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"{repository!r} is no id of a repository; give one such as org/name")
    names = _files(directory)
    for fault in verify(directory, None, progress):
        raise OutputError(f"{fault}; nothing was uploaded")
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = api or HfApi(library_name="precalib")
    additions = [CommitOperationAdd(name, str(directory / name)) for name in names]
    with _refusals(repository):
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        there = hub.list_repo_files(repository, revision=branch)
        others = [n for n in there if n.endswith(".safetensors") and n not in names]
        if others:
            raise OutputError(
                f"{repository}: holds other weights, which vLLM may load ({others[0]}); "
                "remove them there, or give a new repository or --branch"
            )
        commit = hub.create_commit(
            repository,
            additions,
            commit_message=message or f"Upload {read_manifest(directory).run.recipe} checkpoint",
            revision=branch,
        )
    return str(commit.commit_url)


def _files(directory: Path) -> list[str]:
    """Names of all files to upload; OutputError if the card is of another checkpoint."""
    names = [*read_manifest(directory).files, MANIFEST]
    card = directory / CARD
    if card.exists() and CARD not in names:
        digest = recorded_digest(card)
        if digest and digest != hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest():
            raise OutputError(
                f"{card}: is of another checkpoint than {MANIFEST} beside it; "
                f"write it anew with 'precalib card {directory}'"
            )
        names.append(CARD)
    return names


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Errors of the Hub, its client or the network as one sentence."""
    try:
        yield
    except PrecalibError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise OutputError(
            f"{repository}: could not be uploaded ({reason}); 'hf auth login' gives access, and "
            "running the same command again uploads only what is missing"
        ) from error
