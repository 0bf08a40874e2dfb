"""How too little memory shows itself: each library says it in its own way."""

import errno
import re

SHORT = "the memory is not enough; use fewer --jobs, or a machine with more"
# of torch, CUDA, the safetensors library, and Python where a thread gets no stack
_SAID = re.compile("out of memory|allocate memory|can't start new thread|bad_alloc", re.IGNORECASE)


def is_short(error: BaseException) -> bool:
    """Whether an error says that the memory is not enough."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or _SAID.search(str(error)) is not None
