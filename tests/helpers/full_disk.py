"""Runs `precalib` on a small disk of its own that another program fills up while it runs.

    python full_disk.py FOLDER BYTES_LEFT COMMAND…

The disk is mounted at FOLDER, in a mount namespace that ends with this process. After `precalib`
has seen that there is room, all but BYTES_LEFT are taken. Then the room is given back and the same
command runs again, with --resume if it is `quantize`. Prints what both did, and the digests of the
target's files, as JSON; exits with code 77 where no disk can be mounted.
"""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZE = 96 << 20  # of the disk; precalib wants 64 MiB free
NO_MOUNT = 77
INSIDE = "--inside"


def main() -> None:
    """Enter a namespace first, then do what the module says."""
    if sys.argv[1] == INSIDE:
        inside(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *user, "--mount", sys.executable, __file__, INSIDE, *sys.argv[1:]]
    try:
        sys.exit(subprocess.run(words).returncode)
    except FileNotFoundError:
        sys.exit(NO_MOUNT)


def inside(folder: Path, left: int, command: list[str]) -> None:
    """The two runs, and what is there in the end."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        sys.exit(NO_MOUNT)
    from offline_quantize.checkpoint.run import Run

    check = Run._check_space
    filler = folder / "filler"

    def check_and_fill(run: Run) -> None:
        check(run)
        fill(filler, left)

    Run._check_space = check_and_fill  # type: ignore[method-assign]
    first = run_command(command)
    filler.unlink()
    Run._check_space = check  # type: ignore[method-assign]
    between = sorted(path.name for path in folder.rglob("*"))
    second = run_command([*command, *(["--resume"] if command[0] == "quantize" else [])])
    target = folder / "target"
    digests = {
        path.relative_to(target).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
    print(json.dumps({"first": first, "second": second, "between": between, "files": digests}))


def fill(path: Path, left: int) -> None:
    """Take all of the disk's room but for `left` bytes."""
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - left)


def run_command(words: list[str]) -> dict[str, Any]:
    """Exit code and what is said to the user."""
    from offline_quantize.cli import main as cli

    said = io.StringIO()
    sys.argv = ["precalib", *words]
    code: Any = 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return {"code": code, "said": said.getvalue()}


if __name__ == "__main__":
    main()
