"""Threads that quantize weights while others are read."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import set_num_threads  # vLLM makes that of the module torch do nothing on CPUs

from offline_quantize.memory import keep_freed_blocks

WAITING = 1  # tasks per core that may wait beside those that are worked on
Result = TypeVar("Result")


class EncoderPool:
    """A thread for each core, while there is work.

    So that not more than a few weights are in memory, `submit` blocks while enough tasks wait.

    lock: for what tasks of one layer share.
    """

    def __init__(self) -> None:
        self.cores = allowed_cores()
        self.pool: ThreadPoolExecutor | None = None
        self.room = Semaphore((1 + WAITING) * len(self.cores))
        self.lock = Lock()
        self.unclaimed = 0  # tasks whose result nobody has taken

    def submit(self, task: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """What the task returns or raises, in the future."""
        if self.pool is None:
            keep_freed_blocks()
            self.pool = ThreadPoolExecutor(len(self.cores), initializer=self._start_thread)
        self.room.acquire()
        self.unclaimed += 1
        future = self.pool.submit(_without_gradients, task, *arguments)
        future.add_done_callback(lambda _: self.room.release())
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
