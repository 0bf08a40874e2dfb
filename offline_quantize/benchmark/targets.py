"""What is measured: checkpoints, servers that run already, and commands that serve."""

import contextlib
import dataclasses
import json
import re
import shlex
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from offline_quantize.benchmark.server import Server, ServerProcess
from precalib_kernels.errors import InputError, UsageError

MODEL = "bench"  # what requests call a model that is served here
READY_SECONDS = 1800
NAMED = re.compile(r"([\w.+ -]+)=(.+)", re.DOTALL)
PORT = "{port}"


@dataclasses.dataclass(frozen=True)
class Target:
    """One of: the folder of a checkpoint, the address of a server, the command of one.

    label: what results call it.
    """

    label: str
    folder: Path | None = None
    address: str | None = None
    command: Sequence[str] | None = None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read FOLDER, URL or NAME=COMMAND, where {port} in the command stands for the port; a
        name may stand before a folder or an address as well.

        Raises UsageError for a command without a name.
        """
        named = None if Path(text).exists() else NAMED.fullmatch(text)
        label, value = (named[1].strip(), named[2]) if named else (None, text)
        if value.startswith(("http://", "https://")):
            address = value.rstrip("/").removesuffix("/v1")
            return cls(label or address, address=address)
        if PORT in value:
            if label is None:
                raise UsageError(f"{text!r} has no name; write NAME=COMMAND")
            return cls(label, command=shlex.split(value))
        return cls(label or Path(value).resolve().name, folder=Path(value))


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers: its address, and what it calls its model."""

    address: str
    model: str


def start(
    target: Target, out: Path, flags: Sequence[str], stack: contextlib.ExitStack
) -> ServerProcess | None:
    """Start the server of a target, which `stack` will stop; None for one that runs already.

    out: folder of its log;  flags: for `vllm serve`.
    """
    log = out / f"server-{target.label}.log"
    if target.folder is not None:
        server: ServerProcess = Server(MODEL, target.folder, log, *flags)
    elif target.command is not None:
        server = ServerProcess(target.label, target.command, log)
    else:
        return None
    stack.callback(server.stop)
    return server


def running(
    target: Target, server: ServerProcess | None, seconds: float = READY_SECONDS
) -> Running:
    """Where to ask; waits so many seconds for a server that was started."""
    if server is not None:
        server.wait_until_ready(seconds)
    address = server.url if server is not None else target.address
    assert address is not None
    return Running(address, MODEL if target.folder is not None else served_name(address))


def served_name(address: str) -> str:
    """What a running server calls its model. Raises InputError if it does not answer."""
    try:
        with _opener(address).open(f"{address}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{address}: is no server that can be measured ({error})") from error


def _opener(address: str) -> urllib.request.OpenerDirector:
    """One that goes round proxies to servers on this machine."""
    own = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "::1", "localhost")
    return urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * own)
