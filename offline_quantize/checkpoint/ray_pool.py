"""The workers of a Ray cluster whose machines share a file system.

A Ray task carries out one `WriteTask`: it reads a source tensor, and writes what becomes of it into
its place in the partial file. Only digests and reports come back. Running a task twice, or on two
machines at once, writes the same bytes, so Ray may run it again whenever a worker or a machine is
lost. Hessians, which are larger than weights, go into Ray's object store, once for all tasks that
share one. The package `ray` is imported only when a cluster is asked for.
"""

import contextlib
import dataclasses
import logging
import os
import platform
import socket
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from importlib.metadata import version
from typing import Any

import torch

from offline_quantize.checkpoint.worker_pool import Result
from offline_quantize.memory import keep_freed_blocks
from offline_quantize.method.input_statistics import InputStatistics
from precalib_kernels.errors import OutputError, PrecalibError, UsageError

ANY = "auto"  # the cluster of this machine
RETRIES = 10  # of a task whose worker or machine is lost; one that fills the memory ends by it
CONNECT_SECONDS = 10


class RayPool:
    """Tasks of a Ray cluster, one CPU each, spread over its machines."""

    # bytes are on disk when a task ends, and no block around them is written with them
    flags = os.O_DSYNC

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._software = software()
        self._stored: dict[int, tuple[InputStatistics, Any]] = {}
        ray.util.register_serializer(InputStatistics, serializer=self._store, deserializer=_load)
        options = {"num_cpus": 1, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        self._remote = ray.remote(**options)(carry_out)
        self._references: dict[Future[Any], Any] = {}

    def run(
        self, task: Callable[[], Result], begin: Callable[[], None], end: Callable[[Result], None]
    ) -> Future[Result]:
        """Queue a task for the next free CPU; `begin` is called when it ends."""
        reference = self._remote.remote(task, self._software)
        future: Future[Result] = Future()

        def settle(answered: Future[Any]) -> None:
            self._references.pop(future)
            try:
                begin()
                answer = answered.result()
                if isinstance(answer, Failure):
                    raise answer.raised()
                end(answer)
            except Exception as error:
                future.set_exception(self._explained(error))
            else:
                future.set_result(answer)

        self._references[future] = reference
        reference.future().add_done_callback(settle)
        return future

    def abandon(self, futures: Collection[Future[Result]]) -> None:
        """Cancel the tasks that have not ended, and wait for the last of them to do so."""
        for future in futures:
            if reference := self._references.get(future):
                self._ray.cancel(reference)
        for future in futures:
            future.exception()
        self._stored.clear()  # tasks that share statistics are given together

    def close(self) -> None:
        """Take back what Ray was told of our types."""
        self._ray.util.deregister_serializer(InputStatistics)

    def _store(self, statistics: InputStatistics) -> Any:
        """What goes to a worker in place of the statistics of inputs."""
        mean_square, hessian = statistics.mean_square.numpy(), statistics.hessian
        if hessian is None:
            return mean_square, None
        if id(statistics) not in self._stored:
            reference = self._ray.put((mean_square, hessian.numpy()))
            self._stored[id(statistics)] = statistics, reference
        return self._stored[id(statistics)][1]

    def _explained(self, error: Exception) -> Exception:
        """`error` of a task in words for the user, if it is Ray's and not one of ours."""
        errors = self._ray.exceptions
        kinds = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError)
        if isinstance(error, errors.RayTaskError) or not isinstance(error, errors.RayError):
            return error
        if isinstance(error, kinds):
            return OutputError(
                f"a tensor was begun {RETRIES + 1} times and its Ray worker was lost each time, as "
                "happens without enough memory; give the machines fewer CPUs (ray start "
                "--num-cpus) and continue with --resume"
            )
        text = " ".join(str(error).split())[:300]
        return OutputError(f"the Ray cluster failed ({text}); mend it and continue with --resume")


def software() -> str:
    """What bytes depend on besides the weights: versions, and the kind of the processor.

    The instructions of torch's kernels are part of that; those for AVX2 and AVX-512 round alike.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    kind = "vectors" if instructions in ("AVX2", "AVX512") else instructions
    return (
        f"precalib {version('vllm-precalib')}, torch {torch.__version__} "
        f"on {platform.machine()} with {kind}"
    )


def _load(sent: Any) -> InputStatistics:
    """The statistics of inputs, from what `RayPool` sent in their place."""
    import ray

    mean_square, hessian = ray.get(sent) if isinstance(sent, ray.ObjectRef) else sent
    # copied: what lies in the object store cannot be written, of which torch would warn
    return InputStatistics(
        torch.tensor(mean_square), None if hessian is None else torch.tensor(hessian)
    )


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error on its way to this process, and what caused it: pickling would lose that.

    error: of ours, or of the operating system.
    """

    error: Exception
    cause: BaseException | None

    def raised(self) -> Exception:
        """The error, as it was."""
        self.error.__cause__ = self.cause
        return self.error


def carry_out(task: Callable[[], Result], wanted: str) -> Result | Failure:
    """Run a task in a Ray worker; it returns errors that are meant for the user.

    wanted: the `software` where the tasks come from.
    """
    keep_freed_blocks()
    torch.set_num_threads(1)
    try:
        if (found := software()) != wanted:
            raise UsageError(
                f"{platform.node()}: has {found} and not {wanted}, whose bytes may differ; "
                "have the same on all machines of the Ray cluster"
            )
        return task()
    except (PrecalibError, OSError) as error:
        for missing in (error, error.__cause__):
            if isinstance(missing, FileNotFoundError):
                unshared = OutputError(
                    f"{missing.filename}: is not there on machine {platform.node()}; with --ray "
                    "all machines must see source and target under the same paths"
                )
                return Failure(unshared, missing)
        return Failure(error, error.__cause__)


@contextlib.contextmanager
def ray_pool(address: str) -> Iterator[RayPool]:
    """Connect to a Ray cluster for as long as its workers are needed.

    address: HOST:PORT of its head, or "auto" for the cluster that this machine belongs to.

    Raises UsageError if Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs the package ray; install it: pip install ray") from None
    _check_address(address)
    try:
        ray.init(
            address=address,
            namespace="precalib",
            logging_level=logging.ERROR,
            configure_logging=False,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"--ray {address}: the cluster cannot be joined ({text})") from error
    pool = RayPool(ray)
    try:
        yield pool
    finally:
        pool.close()
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise UsageError unless something listens at `address`: Ray would try for minutes."""
    if address == ANY:
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 1 << 16) or "/" in host:
        raise UsageError(
            f"--ray {address}: is no address of a Ray cluster; give HOST:PORT of its head, as in "
            "10.0.0.1:6379, or auto on one of its machines"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--ray {address}: nothing answers there ({reason}); start a cluster with "
            "'ray start --head', and give the address that it prints"
        ) from None
