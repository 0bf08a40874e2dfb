"""The tests of the compiled CPU kernels on other builds of them.

    python rebuilt_suite.py [--sanitize] [--software-tiles] [--isas avx2 …] [options of pytest]

Sanitizers have to be in the process before Python is, and so has libstdc++, whose exceptions they
watch: see `make sanitize`. Tiles in software stand for those of AMX on a machine that has
`avx512_bf16` but no AMX; elsewhere that option changes nothing.
"""

import argparse
import ctypes
import dataclasses
import functools
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[2] / "helpers"))

from sanitized_objects import ADDRESS, DEBUG, UNDEFINED, compile_units, link_library  # noqa: E402

from precalib_kernels.backends.x86 import library  # noqa: E402
from precalib_kernels.toolchain.compile import Library, find_compiler  # noqa: E402

SANITIZERS = (*ADDRESS, *UNDEFINED)
TILES = HERE / "software_tiles.h"


def with_software_tiles(options: library.BuildOptions) -> library.BuildOptions:
    if library.supported_isas()[-1:] != (library.AVX512_BF16.name,):
        return options
    flags = (*library.AVX512_BF16.flags, "-include", str(TILES))
    return dataclasses.replace(
        options,
        isas=(*library.ISAS[:-1], dataclasses.replace(library.AMX, flags=flags)),
        flags=(*options.flags, "-DPRECALIB_SOFTWARE_TILES"),
    )


def with_sanitizers(options: library.BuildOptions) -> library.BuildOptions:
    flags = (*options.flags, *DEBUG, *SANITIZERS)
    return dataclasses.replace(options, flags=flags, link=SANITIZERS)


def load_library(made_of: Library) -> ctypes.CDLL:
    """In place of the product's, so that nothing of these builds is put into the user's cache."""
    compiler = find_compiler()
    assert compiler
    objects = compile_units(compiler, made_of.units)
    return ctypes.CDLL(str(link_library(compiler, objects, made_of.link)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--software-tiles", action="store_true")
    names = [isa.name for isa in library.ISAS]
    parser.add_argument("--isas", nargs="+", choices=names, help="compile no others")
    chosen, options = parser.parse_known_args()
    built = library.DEFAULT_OPTIONS
    if chosen.software_tiles:
        built = with_software_tiles(built)
    if chosen.isas:
        isas = tuple(isa for isa in built.isas if isa.name in chosen.isas)
        built = dataclasses.replace(built, isas=isas)
    if chosen.sanitize:
        built = with_sanitizers(built)
    library.definition = functools.partial(library.definition, built)
    library.load_library = load_library
    library.supported_isas.cache_clear()
    library.load.cache_clear()
    names = ("test_op.py", "test_kernel_table.py", "test_gather_rows.py")
    files = [str(HERE / name) for name in names]
    sys.exit(pytest.main([*files, "-q", "-p", "no:cacheprovider", *options]))
