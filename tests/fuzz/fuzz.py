"""Random damage to checkpoints, as many cases as time allows: `make fuzz`.

    python tests/fuzz/fuzz.py --cases 100000 --minutes 60

Cases come in batches, each with a seed of its own that is printed where one fails; a batch that is
done is noted in --state, so that the next call goes on. `--seed N` runs one batch again.
"""

import argparse
import collections
import contextlib
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "helpers")]

from hostile import (  # noqa: E402
    Sandbox,
    outcome,
    packed_files,
    source_files,
    use_dequantized,
    use_packed,
    use_source,
)
from hostile_damage import damage  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BATCH = 500
CASE_SECONDS = 30
MEMORY = 1 << 30  # bytes that all cases together may add to the process
# of ten batches, how many go each way
WAYS = ("packed", "packed", "packed", "source", "source", "source", "dequantize", "quantize")
PLUGIN_WAYS = (*WAYS, "plugin", "plugin")


STACK = contextlib.ExitStack()  # what lasts as long as the process


class TooLong(BaseException):
    """A case took more than CASE_SECONDS."""


def main() -> None:
    """Run batches until there are enough cases or the time is up."""
    given_options = options()
    names = PLUGIN_WAYS if given_options.plugin else WAYS
    state = read_state(given_options.state)
    signal.signal(signal.SIGALRM, stop)
    begin = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        boxes = sandboxes(Path(folder))
        batch = given_options.seed if given_options.seed is not None else state["batches"]
        while True:
            counts = run_batch(batch, names[batch % len(names)], boxes, Path(folder))
            if given_options.seed is not None:
                print(f"fuzz: batch of seed {batch}: {dict(counts)}")
                return
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


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="to have run in all")
    parser.add_argument("--minutes", type=float, default=60, help="to stop after")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "fuzz" / "state.json")
    parser.add_argument("--seed", type=int, help="run the one batch of this seed")
    parser.add_argument("--no-plugin", dest="plugin", action="store_false", help="without vLLM")
    return parser.parse_args()


def run_batch(
    number: int, way: str, boxes: dict[str, Sandbox], folder: Path
) -> collections.Counter[str]:
    """One batch; how its cases ended, by way and end. Exits where one fails."""
    counts: collections.Counter[str] = collections.Counter()
    box = boxes["source" if way in ("source", "quantize") else "packed"]
    use = plugin() if way == "plugin" else uses(folder)[way]

    @seed(number)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(st.data())
    def cases(data: st.DataObject) -> None:
        with box.damaged(damage(data, box.files)) as root:
            signal.alarm(CASE_SECONDS)
            try:
                end, _ = outcome(lambda: use(root))
            finally:
                signal.alarm(0)
        counts[f"{way} {end}"] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        cases()
    except BaseException:
        print(f"fuzz: a case of way '{way}' fails; again: {sys.argv[0]} --seed {number}")
        raise
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
        way, end = text.split(" ", 1)
        ends = state["ends"].setdefault(way, {})
        ends[end] = ends.get(end, 0) + number


def stop(*_: object) -> None:
    """Of the alarm."""
    raise TooLong(f"more than {CASE_SECONDS} s")


if __name__ == "__main__":
    main()
