"""The tests of the compiled kernels under AddressSanitizer and UBSan; run by `make sanitize`.

The sanitizer has to be in the process before Python is, so this cannot be a test among others; and
so has libstdc++, whose exceptions it watches.
"""

import sys
from pathlib import Path

import pytest

from precalib_kernels.cpu import library

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

if __name__ == "__main__":
    library._COMMON = (*library._COMMON, *SANITIZERS, "-g", "-O1")
    library._LINK = SANITIZERS
    library.machine_levels.cache_clear()
    library.load.cache_clear()
    tests = Path(__file__).with_name("test_cpu.py")
    sys.exit(pytest.main([str(tests), "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
