"""The tests of the compiled CPU kernels on other builds of them.

    python rebuilt_suite.py [--sanitize] [--software-tiles] [options of pytest]

Sanitizers have to be in the process before Python is, and so has libstdc++, whose exceptions they
watch: see `make sanitize`. Tiles in software stand for those of AMX on a machine that has
`avx512_bf16` but no AMX; elsewhere that option changes nothing.
"""

import argparse
import sys
import zlib
from pathlib import Path

import pytest

from precalib_kernels.backends.x86 import library

HERE = Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TILES = HERE / "software_tiles.h"


def with_software_tiles() -> None:
    if library.machine_levels()[-1:] == ("avx512_bf16",):
        digest = zlib.crc32(TILES.read_bytes())  # a library's name knows flags, not this file
        library._COMMON = (*library._COMMON, f"-DPRECALIB_SOFTWARE_TILES={digest}")
        library._ADDED["amx"] = ("-include", str(TILES))


def with_sanitizers() -> None:
    library._COMMON = (*library._COMMON, *SANITIZERS, "-g", "-O1")
    library._LINK = SANITIZERS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--software-tiles", action="store_true")
    chosen, options = parser.parse_known_args()
    if chosen.software_tiles:
        with_software_tiles()
    if chosen.sanitize:
        with_sanitizers()
    library.machine_levels.cache_clear()
    library.load.cache_clear()
    sys.exit(pytest.main([str(HERE / "test_op.py"), "-q", "-p", "no:cacheprovider", *options]))
