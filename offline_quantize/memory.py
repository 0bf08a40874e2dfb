"""How too little memory shows itself, in each library's words, and reuse of what was freed."""

import errno
import re

import torch

SHORT = "the memory is not enough; use fewer --jobs, or a machine with more"
# of torch, CUDA, the safetensors library, and Python where a thread gets no stack
_SAID = re.compile("out of memory|allocate memory|can't start new thread|bad_alloc", re.IGNORECASE)

KEPT_BLOCK = 1 << 23  # four of the blocks that an encoder works in; it keeps twice as much


def keep_freed_blocks() -> None:
    """Have the C library keep freed blocks of an encoder's size and hand them out again.

    glibc returns such blocks to the system, which brings them back page by page, until the program
    has freed one as large: a third of an encoder's time, and more where several threads share the
    pages' lock. Elsewhere this does nothing.
    """
    torch.empty(KEPT_BLOCK, dtype=torch.uint8, device="cpu")


def is_short(error: BaseException) -> bool:
    """Whether an error says that the memory is not enough."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or _SAID.search(str(error)) is not None
