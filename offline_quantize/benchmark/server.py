"""Server processes: started in a process group of their own, stopped without a remainder."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from precalib_kernels.errors import PrecalibError

COMMANDS = Path(sys.executable).parent  # where this environment's `vllm` and `precalib` are
LOG_LINES_SHOWN = 25
STOP_SECONDS = 20

# Nothing is downloaded or reported, unless the caller's environment says otherwise.
QUIET_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large part of the memory
}
OWN_ADDRESS = "127.0.0.1"  # reached without a proxy
# Eager: compiling a small model takes longer than all that is asked of it.
SMALL = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8")


def environment(**more: str) -> dict[str, str]:
    """Environment for commands that need no network; what the caller has set of it stays.

    more: variables that are set whatever the caller has.
    """
    direct = {
        name: ",".join(filter(None, (os.environ.get(name), OWN_ADDRESS)))
        for name in ("NO_PROXY", "no_proxy")
    }
    return QUIET_ENVIRONMENT | os.environ | direct | more


class ServerError(PrecalibError):
    """A server died or never became ready; the text ends with its last log lines."""


class TimeIsUpError(ServerError):
    """A server or a measurement took longer than it was given."""


class ServerProcess:
    """A command that serves OpenAI's API on a free port of 127.0.0.1 until `stop`.

    title:   what errors call it.
    command: its words; "{port}" in them stands for the port.
    log:     file that gets all of its output.
    variables: for its environment.
    """

    def __init__(self, title: str, command: Sequence[str], log: Path, **variables: str) -> None:
        self.title, self.log = title, log
        port = _free_port()
        self.url = f"http://{OWN_ADDRESS}:{port}"
        words = [word.replace("{port}", str(port)) for word in command]
        with log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(**variables),
                    start_new_session=True,
                )
            except OSError as error:
                raise ServerError(
                    f"{title}: {words[0]} cannot be started ({error.strerror})"
                ) from error

    def wait_until_ready(self, seconds: float = 300) -> None:
        """Return once the server is ready.

        Raises ServerError when the process ends, TimeIsUpError when `seconds` pass, before that.
        """
        deadline = time.monotonic() + seconds
        while not self._healthy():
            if self.process.poll() is not None:
                raise self.error(f"ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline:
                raise TimeIsUpError(str(self.error(f"was not ready after {seconds:.0f} s")))
            time.sleep(1)

    @property
    def family(self) -> list[psutil.Process]:
        """All processes that the server has started and that still belong to it."""
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """End the server and every process it started; wait until they are gone."""
        family = self.family
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the leader's pid is the group's
        for process in family:  # those that had left the group
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while any(alive(process) for process in family) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _healthy(self) -> bool:
        """Whether it lists its models, and says nothing else under /health if it knows that."""
        return self._status("/health") in (200, 404) and self._status("/v1/models") == 200

    def _status(self, path: str) -> int | None:
        """Of the answer to a GET; None without one."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:  # refused, reset, or timed out
            return None

    def error(self, what: str) -> ServerError:
        """A ServerError that says `what` happened and shows the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return ServerError("\n".join([f"{self.title} {what}; {self.log}:", *lines]))


class Server(ServerProcess):
    """One model served by `vllm serve`.

    name:  what requests call the model.
    model: a directory, or an id that vLLM resolves.
    flags: for `vllm serve`;  variables: for its environment.
    """

    def __init__(
        self, name: str, model: Path | str, log: Path, *flags: str, **variables: str
    ) -> None:
        self.name, self.model = name, model
        command = [os.environ.get("VLLM") or str(COMMANDS / "vllm"), "serve", str(model), *flags]
        command += ["--host", OWN_ADDRESS, "--port", "{port}", "--served-model-name", name]
        super().__init__(f"vllm serve {Path(model).name}", command, log, **variables)

    def _healthy(self) -> bool:
        return self._status("/health") == 200


def alive(process: psutil.Process) -> bool:
    """False for a zombie too: in a container there may be nobody to reap it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
