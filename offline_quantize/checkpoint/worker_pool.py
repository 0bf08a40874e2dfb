"""Who works on tensors: threads of this process, or whatever else takes a `WorkerPool`'s place."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import torch

from offline_quantize.memory import keep_freed_blocks

Result = TypeVar("Result")


class WorkerPool(Protocol):
    """Runs tasks beside each other, each on one thread of torch's.

    flags: with which a task opens a file to write into it.
    """

    flags: int

    def run(
        self, task: Callable[[], Result], begin: Callable[[], None], end: Callable[[Result], None]
    ) -> Future[Result]:
        """Queue a task.

        begin, end: called in this process: when the task begins, or later; and with its result,
                    before anybody else has it. What `end` raises is taken for an error of the task.
        """

    def abandon(self, futures: Collection[Future[Result]]) -> None:
        """Return once none of these tasks runs, without beginning any more of them."""


class ThreadPool(ThreadPoolExecutor):
    """Threads of this process."""

    flags = 0

    def run(
        self, task: Callable[[], Result], begin: Callable[[], None], end: Callable[[Result], None]
    ) -> Future[Result]:
        """Queue a task for the next free thread."""

        def whole() -> Result:
            begin()
            result = task()
            end(result)
            return result

        return self.submit(whole)

    def abandon(self, futures: Collection[Future[Result]]) -> None:
        """Let the tasks that run come to their end."""
        for future in futures:
            future.cancel()
        wait(futures)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ThreadPool]:
    """A pool of `workers` threads in which torch uses one thread per tensor.

    So results do not depend on the number of workers, and no core is asked for twice.
    """
    keep_freed_blocks()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPool(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
