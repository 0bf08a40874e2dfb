"""Kills `precalib quantize` at random moments and takes the run up again: `make kill`.

    python tests/fuzz/kill.py [--kills 100] [--minutes 30] [--ways WAY …] [--source MODEL]

Ways: as by default, with text that the model writes (`self`), with error feedback (`feedback`), and
runs that are killed while they are resumed, again and again (`resume`). Two ways run on a Ray
cluster of two nodes on this machine. In one the command is killed, again and again (`ray`), in the
other one of Ray's workers or the second node, which the command must survive (`ray-worker`).

Each case is a process that gets SIGKILL at a moment drawn from its seed. What lies there must then
either be whole or be no checkpoint, and a resumed run must write what a run that nobody killed
wrote, byte for byte; on a cluster, what a run without one wrote.

Cases that are done are noted in --state, so that the next call goes on. `--case N` with one way
runs a case again; its moment is the same, what the process had done by then may not be.
"""

import argparse
import contextlib
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

import psutil  # noqa: E402
from ray_cluster import ENVIRONMENT, RayCluster  # noqa: E402
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
    "ray": (),
    "ray-worker": (),
}
ON_RAY = ("ray", "ray-worker")
WHOLE_NODES = 0.2  # of the kills of way `ray-worker`
LOST_NODE = "mend it and continue with --resume"
MOST_KILLS = 4  # of one run that is killed while it is resumed


def main() -> None:
    """Run cases until all are done or the time is up."""
    given = options()
    end = time.monotonic() + 60 * given.minutes
    state = json.loads(given.state.read_text()) if given.state.exists() else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cases = Cases(Path(folder), given.source, stack)
        for way in given.ways:
            done = state.setdefault(way, {"cases": 0, "killed": 0, "resumed": 0})
            cases.measure(way)
            while done["killed"] < given.kills and time.monotonic() < end:
                number = done["cases"] if given.case is None else given.case
                try:
                    killed, resumed = cases.run(way, number)
                except AssertionError as error:
                    sys.exit(f"kill: {error}; again: {sys.argv[0]} --ways {way} --case {number}")
                if given.case is not None:
                    sys.exit()
                done["cases"] += 1
                done["killed"] += killed
                done["resumed"] += resumed
                given.state.parent.mkdir(parents=True, exist_ok=True)
                given.state.write_text(json.dumps(state))
            print(
                f"kill: {way}: {done['killed']} processes killed before their end in "
                f"{done['cases']} cases, {done['resumed']} runs resumed; "
                f"a whole run takes {cases.seconds[way]:.2f} s",
                flush=True,
            )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each way, in all")
    parser.add_argument("--minutes", type=float, default=30, help="to stop after")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--source", type=Path, help="a model in place of a random one")
    parser.add_argument("--state", type=Path, help="by default build/fuzz/kill-MODEL.json")
    parser.add_argument("--case", type=int, help="run this one case")
    given = parser.parse_args()
    name = given.source.resolve().name if given.source else "random"
    given.state = given.state or ROOT / "build" / "fuzz" / f"kill-{name}.json"
    return given


class Cases:
    """What all cases share: the model, what a whole run writes of it, and how long that takes.

    stack: ends the cluster.
    """

    def __init__(self, folder: Path, source: Path | None, stack: contextlib.ExitStack) -> None:
        self.folder, self.source = folder, source or folder / "source"
        self.target = folder / "target"
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.stack = stack
        self.cluster: RayCluster | None = None
        if source is None:
            write_model(self.source)

    def measure(self, way: str) -> None:
        """Runs without a kill, which must write the same."""
        ways = [way, way]
        if way in ON_RAY:
            if self.cluster is None:
                self.cluster = RayCluster()
                self.stack.callback(self.cluster.stop)
            ways = ["default", way]
        for one in ways:
            shutil.rmtree(self.target, ignore_errors=True)
            begin = time.monotonic()
            if self._quantize(one, None, resume=False):
                sys.exit(f"kill: a whole run of way '{one}' fails")
            self.seconds[way] = time.monotonic() - begin
            found = contents(self.target)
            if found != self.expected.setdefault(way, found):
                sys.exit(f"kill: two whole runs of way '{way}' differ")

    def run(self, way: str, number: int) -> tuple[int, int]:
        """One case; how many of its processes were killed before their end, and runs resumed."""
        chance, case = random.Random(f"{way} {number}"), f"{way} {number}"
        shutil.rmtree(self.target, ignore_errors=True)
        if way == "ray-worker":
            return self._run_without_a_worker(chance, case), 0
        killed = resumed = resume = 0
        for _ in range(chance.randint(2, MOST_KILLS) if way in ("resume", "ray") else 1):
            moment = chance.uniform(0, self.seconds[way])
            code = self._quantize(way, moment, resume=bool(resume))
            assert code in (0, -signal.SIGKILL), f"{case}: ended with code {code}"
            killed += code != 0
            resumed += resume
            resume = self._check_what_lies_there(case)
        assert self._quantize(way, None, resume=bool(resume)) == 0, f"{case}: not resumed"
        self._compare(way, case)
        return killed, resumed + resume

    def _run_without_a_worker(self, chance: random.Random, case: str) -> bool:
        """A run during which a worker is killed, or the second node; whether one was."""
        assert self.cluster
        process, killed = self._begin("ray-worker", resume=False), False
        time.sleep(chance.uniform(0, self.seconds["ray-worker"]))
        ended, status = os.waitpid(process, os.WNOHANG)
        whole_node = not ended and chance.random() < WHOLE_NODES
        if whole_node:
            self.cluster.kill(len(self.cluster.nodes) - 1)
            killed = True
        elif not ended and (workers := self.cluster.workers()):
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                killed = True
        if not ended:
            _, status = os.waitpid(process, 0)
        if whole_node:
            self.cluster.add()
        code, lost = os.waitstatus_to_exitcode(status), "node" if whole_node else "worker"
        said = (self.folder / "output.txt").read_text()
        if code and whole_node and LOST_NODE in said:
            # on one address, Ray may have joined the command to the node that died
            code = self._quantize("ray-worker", None, resume=self._check_what_lies_there(case))
        assert code == 0, f"{case}: did not survive the loss of a {lost}: {said[-1000:]}"
        self._compare("ray-worker", case)
        return killed

    def _compare(self, way: str, case: str) -> None:
        """What lies there is what a run that nobody killed writes."""
        found = contents(self.target)
        differing = sorted(
            name
            for name in found.keys() | self.expected[way].keys()
            if found.get(name) != self.expected[way].get(name)
        )
        assert not differing, f"{case}: other bytes in {', '.join(differing)}"

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
        """The command, killed after so many seconds; its exit code."""
        process = self._begin(way, resume=resume)
        if moment is not None:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)  # it is a zombie if it has ended
        return self._code(os.waitpid(process, 0)[1])

    def _begin(self, way: str, *, resume: bool) -> int:
        """Start the command in a process of its own: a fork of this one, which has imported all."""
        words = ["precalib", "quantize", str(self.source), str(self.target), *WAYS[way]]
        if resume:
            words.append("--resume")
        if way in ON_RAY and self.cluster:
            words += ["--ray", self.cluster.address]
        process = os.fork()
        if not process:
            os.environ.update(ENVIRONMENT if way in ON_RAY else {})
            execute(words, self.folder / "output.txt")
        return process

    def _code(self, status: int) -> int:
        """The exit code; what the command said is printed if it is an error."""
        code = os.waitstatus_to_exitcode(status)
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
