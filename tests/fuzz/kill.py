"""Kills `precalib quantize` at random moments and takes the run up again: `make kill`.

    python tests/fuzz/kill.py [--kills 100] [--minutes 30] [--source MODEL]

Ways: as by default, with text that the model writes (`self`), with error feedback (`feedback`), and
runs that are killed while they are resumed, again and again (`resume`). Each case is a process that
gets SIGKILL at a moment drawn from its seed. What lies there must then either be whole or be no
checkpoint, and a resumed run must write what a run that nobody killed wrote, byte for byte.

Cases that are done are noted in --state, so that the next call goes on. `--case N` with one way
runs a case again; its moment is the same, what the process had done by then may not be.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "helpers")]

from tiny_models import random_llama  # noqa: E402

from offline_quantize.checkpoint.atomic_files import JOB, PARTIAL  # noqa: E402
from offline_quantize.checkpoint.packed import open_packed  # noqa: E402
from offline_quantize.checkpoint.progress import NullProgress  # noqa: E402
from offline_quantize.cli import main as cli  # noqa: E402
from offline_quantize.commands.verify import verify  # noqa: E402
from precalib_kernels.errors import PrecalibError  # noqa: E402

WAYS = {
    "default": (),
    "self": ("--activations", "self", "--activation-tokens", "64"),
    "feedback": ("--feedback", "--activation-tokens", "64"),
    "resume": (),
}
MOST_KILLS = 4  # of one run that is killed while it is resumed


def main() -> None:
    """Run cases until all are done or the time is up."""
    given = options()
    end = time.monotonic() + 60 * given.minutes
    state = json.loads(given.state.read_text()) if given.state.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder), given.source)
        for way in given.ways:
            done = state.setdefault(way, {"cases": 0, "killed": 0})
            cases.measure(way)
            while done["killed"] < given.kills and time.monotonic() < end:
                number = done["cases"] if given.case is None else given.case
                try:
                    done["killed"] += cases.run(way, number)
                except AssertionError as error:
                    sys.exit(f"kill: {error}; again: {sys.argv[0]} --ways {way} --case {number}")
                if given.case is not None:
                    sys.exit()
                done["cases"] += 1
                given.state.parent.mkdir(parents=True, exist_ok=True)
                given.state.write_text(json.dumps(state))
            print(
                f"kill: {way}: {done['killed']} processes killed before their end in "
                f"{done['cases']} cases; a whole run takes {cases.seconds[way]:.2f} s",
                flush=True,
            )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each way, in all")
    parser.add_argument("--minutes", type=float, default=30, help="to stop after")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--source", type=Path, help="a model in place of a random one")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "fuzz" / "kill.json")
    parser.add_argument("--case", type=int, help="run this one case")
    return parser.parse_args()


class Cases:
    """What all cases share: the model, what a whole run writes of it, and how long that takes."""

    def __init__(self, folder: Path, source: Path | None) -> None:
        self.folder, self.source = folder, source or folder / "source"
        self.target = folder / "target"
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        if source is None:
            write_model(self.source)

    def measure(self, way: str) -> None:
        """Runs without a kill, which must write the same."""
        for _ in range(3):
            shutil.rmtree(self.target, ignore_errors=True)
            begin = time.monotonic()
            if self._quantize(way, None, resume=False):
                sys.exit(f"kill: a whole run of way '{way}' fails")
            seconds = time.monotonic() - begin
            self.seconds[way] = min(seconds, self.seconds.get(way, seconds))
            found = contents(self.target)
            if found != self.expected.setdefault(way, found):
                sys.exit(f"kill: two whole runs of way '{way}' differ")

    def run(self, way: str, number: int) -> int:
        """One case; how many of its processes were killed before their end."""
        chance = random.Random(f"{way} {number}")
        shutil.rmtree(self.target, ignore_errors=True)
        killed = resume = 0
        for _ in range(1 if way != "resume" else chance.randint(2, MOST_KILLS)):
            moment = chance.uniform(0, self.seconds[way])
            code = self._quantize(way, moment, resume=bool(resume))
            assert code in (0, -signal.SIGKILL), f"{way} {number}: ended with code {code}"
            killed += code != 0
            resume = self._check_what_lies_there(f"{way} {number}")
        assert self._quantize(way, None, resume=bool(resume)) == 0, f"{way} {number}: not resumed"
        found = contents(self.target)
        differing = sorted(
            name
            for name in found.keys() | self.expected[way].keys()
            if found.get(name) != self.expected[way].get(name)
        )
        assert not differing, f"{way} {number}: other bytes in {', '.join(differing)}"
        return killed

    def _check_what_lies_there(self, case: str) -> bool:
        """Whether a run can be resumed there; what is no unfinished run must be whole."""
        names = {path.name for path in self.target.iterdir()} if self.target.is_dir() else set()
        if not names - {JOB + PARTIAL}:
            return False
        try:
            open_packed(self.target)
        except PrecalibError:
            assert JOB in names, f"{case}: neither whole nor a run that can be resumed: {names}"
            return True
        faults = list(verify(self.target, self.source, NullProgress()))
        assert not faults, f"{case}: {faults[0]}"
        return True

    def _quantize(self, way: str, moment: float | None, *, resume: bool) -> int:
        """The command in a process of its own, killed after so many seconds; its exit code.

        The process is a fork of this one, which has imported everything.
        """
        words = ["precalib", "quantize", str(self.source), str(self.target), *WAYS[way]]
        if resume:
            words.append("--resume")
        process = os.fork()
        if not process:
            execute(words, self.folder / "output.txt")
        if moment is not None:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)  # it is a zombie if it has ended
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code > 0:
            print((self.folder / "output.txt").read_text()[-3000:])
        return code


def execute(words: list[str], output: Path) -> None:
    """The command in place of this process, which it ends; what it says goes to a file."""
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = words
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write_model(folder: Path) -> None:
    """A random llama in several files."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 160, "vocab_size": 260}
    tokens = {"bos_token_id": 256, "eos_token_id": None, "pad_token_id": None}
    model = random_llama(max_position_embeddings=128, **sizes, **tokens)
    model.bfloat16().save_pretrained(folder, max_shard_size="100KB")


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
