"""Random damage to checkpoints, as many cases as time allows: `make fuzz`.

    python tests/fuzz/fuzz.py --cases 100000 --minutes 60

Cases come in batches. A batch that is done is noted in --state, so that the next call goes on. A
case that fails is told with its seed and does not stop the others; `--seed BATCH --case N` runs it
again.
"""

import argparse
import collections
import contextlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "helpers")]

from hostile import (  # noqa: E402
    OPTIONS,
    Sandbox,
    outcome,
    packed_files,
    source_files,
    use_dequantized,
    use_packed,
    use_source,
)
from hostile_damage import damage  # noqa: E402

BATCH = 500
CASE_SECONDS = 120  # of a clock on the wall, on a busy machine
MEMORY = 1 << 30  # bytes that all cases together may add to the process
# of ten batches, how many go each way
WAYS = ("packed", "packed", "source", "target bits", "packed", "head", "dequantize", "quantize")
PLUGIN_WAYS = (*WAYS, "plugin", "plugin")


STACK = contextlib.ExitStack()  # what lasts as long as the process


class TooLong(BaseException):
    """A case took more than CASE_SECONDS."""


class Failures:
    """Cases that failed, told once for each place in the code where they did."""

    def __init__(self) -> None:
        self.places: collections.Counter[str] = collections.Counter()

    def add(self, error: BaseException, way: str, number: int, case: int) -> None:
        """Tell it if no other failed there."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {frame.name}, {frame.filename}:{frame.lineno}"
        self.places[place] += 1
        if self.places[place] == 1:
            print("".join(traceback.format_exception(error))[-3000:])
            again = f"{sys.argv[0]} --seed {number} --case {case}"
            print(f"fuzz: way '{way}': {place}; again: {again}", flush=True)


def main() -> None:
    """Run batches until there are enough cases or the time is up."""
    given_options = options()
    names = PLUGIN_WAYS if given_options.plugin else WAYS
    state = read_state(given_options.state)
    signal.signal(signal.SIGALRM, stop)
    begin = time.monotonic()
    memory = Path("/dev/shm")
    failures = Failures()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        boxes = sandboxes(Path(folder))
        batch = given_options.seed if given_options.seed is not None else state["batches"]
        while True:
            cases = range(BATCH) if given_options.case is None else [given_options.case]
            way = names[batch % len(names)]
            counts = run_batch(batch, cases, way, boxes, Path(folder), failures)
            if given_options.seed is not None:
                print(f"fuzz: batch of seed {batch}: {dict(counts)}")
                sys.exit(bool(failures.places))
            batch += 1
            add(state, batch, counts)
            given_options.state.parent.mkdir(parents=True, exist_ok=True)
            given_options.state.write_text(json.dumps(state, indent=1))
            minutes = (time.monotonic() - begin) / 60
            if state["cases"] >= given_options.cases or minutes > given_options.minutes:
                break
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"fuzz: {state['cases']:,} cases in all, {minutes:.1f} minutes this time, next seed "
        f"{batch}, {added >> 10} MB at most"
    )
    for way, ends in state["ends"].items():
        print(f"fuzz: {way}: {', '.join(f'{n:,} {end}' for end, n in sorted(ends.items()))}")
    for place, number in failures.places.items():
        print(f"fuzz: {number} cases failed: {place}")
    sys.exit(bool(failures.places))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="to have run in all")
    parser.add_argument("--minutes", type=float, default=60, help="to stop after")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "fuzz" / "state.json")
    parser.add_argument("--seed", type=int, help="run the one batch of this seed")
    parser.add_argument("--case", type=int, help="and of it only this case")
    parser.add_argument("--no-plugin", dest="plugin", action="store_false", help="without vLLM")
    return parser.parse_args()


def run_batch(
    number: int,
    cases: Iterable[int],
    way: str,
    boxes: dict[str, Sandbox],
    folder: Path,
    failures: Failures,
) -> collections.Counter[str]:
    """One batch; how its cases ended, by way and end."""
    counts: collections.Counter[str] = collections.Counter()
    use = plugin() if way == "plugin" else uses(folder)[way]
    box = boxes["packed" if way in ("packed", "dequantize", "plugin") else "source"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        files = damage(random.Random(f"{number} {case}"), box.files)
        with box.damaged(files) as root:
            signal.alarm(CASE_SECONDS)
            try:
                end, _ = outcome(lambda: use(root))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failures.add(error, way, number, case)
                end = "failed"
            finally:
                signal.alarm(0)
        counts[f"{way}: {end}"] += 1
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if added > MEMORY:
        sys.exit(f"fuzz: the batch of seed {number} took {added >> 20} MB of memory")
    return counts


def uses(folder: Path) -> dict[str, Callable[[Path], str]]:
    """What is done with a damaged folder, by the name of the way."""

    return {
        "packed": use_packed,
        "dequantize": lambda root: use_dequantized(root, folder / "target"),
        "source": lambda root: use_source(root, folder / "target", write=False),
        "target bits": lambda root: use_source(root, folder / "target", False, OPTIONS[1]),
        "head": lambda root: use_source(root, folder / "target", False, OPTIONS[2]),
        "quantize": lambda root: use_source(root, folder / "target", write=True),
    }


def plugin() -> Callable[[Path], str]:
    """What is done in vLLM, whose import takes seconds."""
    from hostile_plugin import one_rank, use_plugin

    STACK.enter_context(one_rank())
    return use_plugin


def sandboxes(folder: Path) -> dict[str, Sandbox]:
    """A source and a packed checkpoint."""
    packed = packed_files(folder / "making")
    return {
        "source": Sandbox(folder / "source", source_files()),
        "packed": Sandbox(folder / "packed", packed),
    }


def read_state(path: Path) -> dict[str, Any]:
    """What earlier calls did."""
    if path.exists():
        state: dict[str, Any] = json.loads(path.read_text())
        return state
    return {"batches": 0, "cases": 0, "ends": {}}


def add(state: dict[str, Any], batches: int, counts: collections.Counter[str]) -> None:
    """Note a batch that is done."""
    state["batches"] = batches
    state["cases"] += counts.total()
    for text, number in counts.items():
        way, end = text.split(": ", 1)
        ends = state["ends"].setdefault(way, {})
        ends[end] = ends.get(end, 0) + number


def stop(*_: object) -> None:
    """Of the alarm."""
    raise TooLong(f"more than {CASE_SECONDS} s")


if __name__ == "__main__":
    main()
