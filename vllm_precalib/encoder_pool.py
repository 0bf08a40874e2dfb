"""Threads that quantize weights while others are read."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Condition, Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import set_num_threads  # vLLM makes that of the module torch do nothing on CPUs

from offline_quantize.memory import keep_freed_blocks

WAITING = 1  # tasks per thread that may wait beside those that are worked on
MOST_THREADS = 32  # each takes some hundred MB for a large weight
MOST_BYTES = 4 << 30  # of weights that are worked on or wait
QUOTA = Path("/sys/fs/cgroup/cpu.max")
Result = TypeVar("Result")


class Room:
    """Makes those wait that bring more work than is wanted at once: tasks, or bytes of weights."""

    def __init__(self, tasks: int, nbytes: int) -> None:
        self.all = self.free = (tasks, nbytes)
        self.changed = Condition()

    def enter(self, nbytes: int) -> None:
        """Return once there is room for a task with so many bytes, or no other task is inside."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.free == self.all or (self.free[0] > 0 and self.free[1] >= nbytes)
            )
            self.free = self.free[0] - 1, self.free[1] - nbytes

    def leave(self, nbytes: int) -> None:
        """A task that has entered is done."""
        with self.changed:
            self.free = self.free[0] + 1, self.free[1] + nbytes
            self.changed.notify_all()


class EncoderPool:
    """A thread for each core that the process may use, up to MOST_THREADS, while there is work.

    So that only a few weights are in memory, `submit` blocks while enough tasks wait.

    lock: for what tasks of one layer share.
    """

    def __init__(self) -> None:
        self.cores = allowed_cores()
        self.pool: ThreadPoolExecutor | None = None
        self.threads = min(len(self.cores), cpu_quota(), MOST_THREADS)
        self.room = Room((1 + WAITING) * self.threads, MOST_BYTES)
        self.lock = Lock()
        self.unclaimed = 0  # tasks whose result nobody has taken

    def submit(self, task: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """What the task returns or raises, in the future."""
        if self.pool is None:
            keep_freed_blocks()
            self.pool = ThreadPoolExecutor(self.threads, initializer=self._start_thread)
        nbytes = sum(value.nbytes for value in arguments if isinstance(value, Tensor))
        self.room.enter(nbytes)
        self.unclaimed += 1
        future = self.pool.submit(_without_gradients, task, *arguments)
        future.add_done_callback(lambda _: self.room.leave(nbytes))
        return future

    def result(self, future: "Future[Result]") -> Result:
        """What `submit` promised, once; the threads end with the last."""
        self.unclaimed -= 1
        try:
            return future.result()
        finally:
            if self.pool is not None and not self.unclaimed:
                self.pool.shutdown()
                self.pool = None
                set_num_threads(torch.get_num_threads())  # what threads to come begin with

    def __deepcopy__(self, memo: Any) -> "EncoderPool":
        return EncoderPool()

    def __reduce__(self) -> tuple[Callable[[], "EncoderPool"], tuple[()]]:
        return EncoderPool, ()

    def _start_thread(self) -> None:
        set_num_threads(1)  # results do not depend on the number of threads then
        os.sched_setaffinity(0, self.cores)  # vLLM pins the thread that began this one


def _without_gradients(task: Callable[..., Result], *arguments: Any) -> Result:
    with torch.no_grad():  # each thread has its own setting
        return task(*arguments)


def allowed_cores() -> set[int]:
    """Cores that any thread of this process may run on."""
    cores: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            cores |= os.sched_getaffinity(int(task.name))
        except ProcessLookupError:
            continue  # ended since
    return cores


def own_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU of a tensor whose owner may use its memory again.

    Made by one thread: torch's would wait for cores on which the pool computes.
    """
    if tensor.device.type != "cpu":
        return tensor.to("cpu").contiguous()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.view(torch.uint8).numpy()[...] = tensor.contiguous().view(torch.uint8).numpy()
    return copy


def cpu_quota(file: Path = QUOTA) -> int:
    """Cores' worth of time that the container may use, rounded up; that of all if none is set."""
    try:
        allowed, period = map(int, file.read_text().split())  # or "max" and a period
    except (OSError, ValueError):
        return os.cpu_count() or 1
    return max(1, -(-allowed // period))
