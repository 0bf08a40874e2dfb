"""Compile the C++ libraries where there is a compiler; all else is in pyproject.toml.

An installation carries them in `precalib_kernels/toolchain/compiled`. An editable one, whose
sources stay as they are, finds them in the user's cache. Without a compiler the first use tries
again.
"""

import platform
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "kernels"
ENCODER = ROOT / "offline_quantize" / "method" / "csrc"
sys.path.insert(0, str(KERNELS))  # pip builds where nothing but setuptools is installed

from precalib_kernels.backends.arm import library as arm  # noqa: E402
from precalib_kernels.backends.x86 import library as x86  # noqa: E402
from precalib_kernels.toolchain import cache  # noqa: E402
from precalib_kernels.toolchain import compile as build  # noqa: E402

DEFINITIONS: dict[str, Callable[[], build.Library]] = {
    "viterbi": partial(build.definition, ENCODER / "viterbi.cpp"),
    "feedback": partial(build.definition, ENCODER / "feedback.cpp"),
    "cpu": arm.definition if platform.machine() == "aarch64" else x86.definition,
}


class Distribution(setuptools.Distribution):
    """Pure Python until a library is compiled into it."""

    compiled = False

    def has_ext_modules(self) -> bool:
        """Whether files belong where a platform's own go."""
        return self.compiled


class BuildPython(build_py):
    """Python files, then the libraries."""

    distribution: Distribution

    def run(self) -> None:
        """Copy, then compile; a library that cannot be is a line of the log."""
        super().run()
        directory = cache.cache_directory()
        if not self.editable_mode:
            directory = Path(self.build_lib).resolve() / build.COMPILED.relative_to(KERNELS)
            shutil.rmtree(directory, ignore_errors=True)  # what an earlier version left in build/
        for name, define in DEFINITIONS.items():
            try:
                made = define()
                path = directory / made.file_name()
                remarks = () if path.exists() else build.compile_library(made, path)
            except build.BuildError as error:
                print(f"vllm-precalib: library {name} is left for its first use: {error}")
            else:
                for remark in remarks:
                    print(f"vllm-precalib: library {name}: {remark}")
                print(f"vllm-precalib: library {name} is compiled")
                self.distribution.compiled = not self.editable_mode


class Wheel(bdist_wheel):
    """A wheel for this platform if it holds a library, and for every Python 3 either way."""

    distribution: Distribution

    def run(self) -> None:
        """Build first: what was compiled decides the kind of wheel."""
        self.run_command("build")
        self.root_is_pure = self.distribution.is_pure()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Libraries are loaded by ctypes and know nothing of Python."""
        return "py3", "none", super().get_tag()[2]


setuptools.setup(distclass=Distribution, cmdclass={"build_py": BuildPython, "bdist_wheel": Wheel})
