"""`precalib report`: a packed checkpoint as one HTML page that needs no network and no server."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from offline_quantize.checkpoint.atomic_files import check_folder, write_bytes
from offline_quantize.checkpoint.progress import Progress
from precalib_kernels.errors import OutputError, UsageError

MARK = '<meta name="generator" content="precalib report">'
NEEDED = ("matplotlib",)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to show of a packed checkpoint, and where to write it.

    out:         the HTML file; an earlier report there is replaced, another file only by `force`.
    against:     the source checkpoint, which histograms of the weights before need; or None.
    evaluations: results of `precalib eval --json`.
    tensors:     patterns of the modules to draw; none for the worst of each kind.
    seconds:     what quantizing took, where that is known.
    jobs:        weights unpacked at a time.
    """

    out: Path
    against: Path | None = None
    evaluations: Sequence[Path] = ()
    tensors: Sequence[str] = ()
    seconds: float | None = None
    jobs: int = 1
    force: bool = False


def check_out(
    out: Path, force: bool = False, option: str = "--out", made: Path | None = None
) -> None:
    """Refuse early what `write_report` cannot do.

    option: by which the file was named.
    made:   folder that will be there when the report is written.

    Raises UsageError if an optional package is missing, OutputError if the report would replace
    something else, or its folder is missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"a report needs {' and '.join(missing)}; "
            "install what it needs with: pip install 'vllm-precalib[report]'"
        )
    if out.is_dir():
        raise OutputError(f"{out}: is a directory; give {option} the name of an HTML file")
    if made is None or out.parent.resolve() != made.resolve():
        check_folder(out, option)
    if out.exists() and not force and not _is_report(out):
        raise OutputError(
            f"{out}: exists and is not a report; give another {option}"
            + (", or --force to replace it" if option == "--out" else "")
        )


def write_report(directory: Path, request: Request, progress: Progress) -> None:
    """Write the report of a packed checkpoint, whole or not at all.

    The same checkpoint, sources and evaluations give the same bytes on the same machine.

    Raises PrecalibError for an unreadable checkpoint, a source that is not its source, a pattern
    that matches nothing, and an output file that would replace something else.
    """
    check_out(request.out, request.force)
    # matplotlib takes a second to import, and only reports need it
    from offline_quantize.report.contents import gather
    from offline_quantize.report.page import render

    page = render(gather(directory, request, progress))
    write_bytes(request.out, page.encode())


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(1024)
