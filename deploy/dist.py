"""Build the source archive and the wheel so that a second build gives the same bytes.

    python deploy/dist.py build/dist

What is built is the commit that is checked out, not the working tree. Times in the archives are
that of the commit, or $SOURCE_DATE_EPOCH. The wheel holds libraries that the compiler here made for
this processor, so equal wheels need the same compiler and processor; without a compiler the wheel
is pure and equal everywhere. Needs git, and setuptools in this environment.
"""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOOK = "from setuptools import build_meta; build_meta.build_{kind}({out!r})"


def main() -> None:
    """Build both into the folder given, and print their digests."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        checked_out(Path(work))
        for path in build(Path(work), out, commit_time()):
            print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")


def commit_time() -> int:
    """Seconds since 1970 of the commit, unless the environment says something else."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    return int(git("log", "-1", "--format=%ct"))


def checked_out(folder: Path) -> None:
    """Put the files of the commit into a folder."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as archive:
        archive.extractall(folder, filter="data")


def build(source: Path, out: Path, seconds: int) -> list[Path]:
    """The source archive and the wheel of a folder of sources."""
    for path in source.rglob("*"):  # whose permissions go into the wheel
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = os.umask(0o022)
    try:
        made = [hook("sdist", source, out, seconds), hook("wheel", source, out, seconds)]
    finally:
        os.umask(before)
    normalize(made[0], seconds)
    return made


def hook(kind: str, source: Path, out: Path, seconds: int) -> Path:
    """Run a hook of the build backend, as pip does; the file that it made."""
    with tempfile.TemporaryDirectory(dir=out) as work:
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(seconds), "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-c", HOOK.format(kind=kind, out=work)]
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"dist: the {kind} cannot be built: {done.stderr.strip()[-1000:]}")
        (made,) = Path(work).iterdir()
        return made.replace(out / made.name)


def normalize(path: Path, seconds: int) -> None:
    """Write a .tar.gz again: names in order, one time, no owners, nothing of this machine."""
    with tarfile.open(path) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        contents = [
            (member, archive.extractfile(member) if member.isfile() else None) for member in members
        ]
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as again:
            for member, data in contents:
                member.mtime, member.uid, member.gid = seconds, 0, 0
                member.uname = member.gname = ""
                member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                member.pax_headers = {}
                again.addfile(member, data)
    path.write_bytes(gzip.compress(packed.getvalue(), 9, mtime=seconds))


def git(*words: str) -> bytes:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
