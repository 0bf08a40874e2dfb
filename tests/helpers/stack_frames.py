"""How much stack the functions of a shared library use, read off its machine code.

Frames are counted from above: every register that is pushed, every constant that is taken from the
stack pointer, and what alignment may add. A frame whose size is not a constant has no bound.
"""

import bisect
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

RETURN_ADDRESS = 8
HEAD = re.compile(r"^([0-9a-f]+) <(.+)>:$")
TARGET = re.compile(r"\b(call|j\w+)\s+([0-9a-f]+) <")
CONSTANT = re.compile(r"\b(sub|add)\s+\$(-?0x[0-9a-f]+),%rsp")
ALIGNMENT = re.compile(r"\band\s+\$(0x[0-9a-f]+),%rsp")
# sub %rax,%rsp and the like: as large as data say
VARIABLE = re.compile(r"\b(?:sub|add)\s+%\w+,%rsp")
WORD = 1 << 64


class UnboundedError(Exception):
    """A frame grows with data, or functions call each other in a circle."""


@dataclass
class Function:
    """A function of the library: its frame in bytes, and what it calls or jumps to outside."""

    name: str
    start: int
    frame: int = RETURN_ADDRESS
    targets: set[int] = field(default_factory=set)


class Library:
    """The functions of a shared library."""

    def __init__(self, path: Path) -> None:
        command = ["objdump", "--disassemble", "--no-show-raw-insn", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.functions = list(_functions(text))
        self._starts = [function.start for function in self.functions]

    def named(self, pattern: str) -> list[Function]:
        """Functions whose (mangled) name has a match."""
        return [f for f in self.functions if re.search(pattern, f.name)]

    def depth(self, function: Function) -> int:
        """Bytes of the deepest chain of calls that starts here; calls by pointer are left out."""
        return self._depth(function, {}, ())

    def _depth(self, function: Function, known: dict[int, int], path: tuple[int, ...]) -> int:
        if function.start in path:
            raise UnboundedError(f"{function.name} calls itself")
        if function.start not in known:
            inner = {self._at(target).start: self._at(target) for target in function.targets}
            deeper = [self._depth(f, known, (*path, function.start)) for f in inner.values()]
            known[function.start] = function.frame + max(deeper, default=0)
        return known[function.start]

    def _at(self, address: int) -> Function:
        return self.functions[bisect.bisect_right(self._starts, address) - 1]


def _functions(text: str) -> Iterator[Function]:
    current: Function | None = None
    jumps: set[int] = set()
    for line in text.splitlines():
        if head := HEAD.match(line):
            if current:
                yield _closed(current, jumps, int(head[1], 16))
            current = Function(head[2], int(head[1], 16))
            jumps = set()
        elif current and "%rsp" in line:
            current.frame += _taken(line, current.name)
        elif current and (target := TARGET.search(line)):
            (current.targets if target[1] == "call" else jumps).add(int(target[2], 16))
        elif current and "\tpush " in line:
            current.frame += 8
    if current:
        yield _closed(current, jumps, WORD)


def _closed(function: Function, jumps: set[int], end: int) -> Function:
    """With those of its jumps that leave it."""
    function.targets |= {to for to in jumps if not function.start <= to < end}
    return function


def _taken(line: str, name: str) -> int:
    """Bytes by which an instruction may lower the stack pointer."""
    if VARIABLE.search(line):
        raise UnboundedError(f"{name} has a frame that grows with data:{line}")
    if found := CONSTANT.search(line):
        value = int(found[2], 16)
        value = value - WORD if value >= WORD // 2 else value
        return max(value if found[1] == "sub" else -value, 0)
    if found := ALIGNMENT.search(line):
        return WORD - int(found[1], 16) - 1
    return 0
