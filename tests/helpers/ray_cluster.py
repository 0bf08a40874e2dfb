"""A Ray cluster of several nodes on this machine, each with one CPU."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SECONDS = 120  # for a node to come up
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # a token would be written into the user's home
    "RAY_worker_niceness": "0",  # tests have no time to lose on a busy machine
    "OMP_NUM_THREADS": "1",
}


class RayCluster:
    """Nodes whose processes end with `stop`, or one after the other with `kill`.

    count: of nodes.
    """

    def __init__(self, count: int = 2) -> None:
        # sockets lie in it, whose paths may not be long
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.1:{free_port()}"
        try:
            port = self.address.rpartition(":")[2]
            self._start("--head", f"--port={port}", "--include-dashboard=false")
            self.wait(1)
            for _ in range(1, count):
                self.add()
        except BaseException:
            self.stop()
            raise

    def add(self) -> None:
        """Another node."""
        self._start(f"--address={self.address}")
        self.wait(len(self.nodes))

    def kill(self, number: int) -> None:
        """Let a node die with all its processes, as a machine does."""
        node = self.nodes[number]
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            process.kill()
        node.wait()

    def workers(self) -> list[psutil.Process]:
        """Processes that carry tasks out, or wait for some."""
        found = []
        for node in self.nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(node.pid).children(recursive=True)
                found += [child for child in children if _is_worker(child)]
        return found

    def stop(self) -> None:
        """End all nodes."""
        for number, node in reversed(list(enumerate(self.nodes))):
            if node.poll() is None:
                self.kill(number)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self, count: int) -> None:
        """Until so many nodes have come up."""
        end = time.monotonic() + SECONDS
        while self._raylets() < count:
            if time.monotonic() > end or self.nodes[-1].poll() is not None:
                raise RuntimeError(f"Ray did not start:\n{self._log()}")
            time.sleep(0.2)

    def _start(self, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += ["--block", "--num-cpus=1", "--object-store-memory=80000000"]
        command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # two nodes share one range
        command += [f"--temp-dir={self.folder}"] if "--head" in options else []
        with (self.folder / f"{len(self.nodes)}.log").open("wb") as log:
            environment = {**os.environ, **ENVIRONMENT}
            node = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.nodes.append(node)

    def _raylets(self) -> int:
        """Nodes that say that they run."""
        return self._log().count("Ray runtime started")

    def _log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


def _is_worker(process: psutil.Process) -> bool:
    """No agent of a node: the node ends with it."""
    try:
        title = "".join(process.cmdline()[:1])
    except psutil.Error:  # it has just ended
        return False
    return title.startswith("ray::") and not title.endswith("Agent")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
