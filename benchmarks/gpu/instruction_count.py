"""Instructions of a kernel's loops, counted in its compiled code."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

from aot_compile import Compiled

TENSOR = re.compile(r"^(U?H[G]?MMA|UTC\w*MMA|I[G]?MMA|v_mfma_|v_wmma_|v_smfmac_)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions of one round of a loop, branches and inner loops included once."""

    operations: tuple[str, ...]

    @property
    def tensor(self) -> bool:
        """Whether it uses the tensor cores."""
        return any(TENSOR.match(op) for op in self.operations)

    def counts(self) -> Counter[str]:
        """Instructions by their name without modifiers."""
        return Counter(op.split(".")[0] for op in self.operations)


def loops(compiled: Compiled) -> list[Loop]:
    """The innermost loops in the order of their code.

    On AMD, scalar instructions are left out: they have an issue slot of their own.
    """
    amd = compiled.target.startswith("gfx")
    code = list(_amd(compiled.code) if amd else _nvidia(compiled.code))
    place = {address: i for i, (address, _, _) in enumerate(code)}
    spans = []
    for i, (_, _, goes_to) in enumerate(code):
        first = place.get(goes_to, i + 1) if goes_to is not None else i + 1
        if first < i:  # a jump to itself ends the program and is no loop
            spans.append((first, i))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [
        Loop(tuple(op for _, op, _ in code[first : last + 1] if not (amd and op.startswith("s_"))))
        for first, last in sorted(inner)
    ]


def spills(compiled: Compiled) -> int:
    """Instructions in loops that move what has no register to memory and back."""
    names = ("STL", "LDL", "scratch_")
    return sum(op.startswith(names) for loop in loops(compiled) for op in loop.operations)


def all_operations(compiled: Compiled) -> int:
    """Instructions of the whole kernel, once each."""
    code = _amd(compiled.code) if compiled.target.startswith("gfx") else _nvidia(compiled.code)
    return sum(not op.startswith(("s_", "NOP")) for _, op, _ in code)


def _nvidia(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Address, operation and the address it may jump to, of every instruction."""
    for address, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text):
        operation = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]
        jump = re.search(r"\b0x([0-9a-f]+)$", line.strip()) if operation.startswith("BRA") else None
        yield f"{int(address, 16):x}", operation, f"{int(jump[1], 16):x}" if jump else None


def _amd(text: str) -> Iterator[tuple[str, str, str | None]]:
    """The same; an instruction after a label has the label as its address."""
    label = ""
    for number, line in enumerate(text.splitlines()):
        bare = line.split(";")[0].strip()
        if found := re.match(r"^(\.LBB\w+):", bare):
            label = found[1]
        elif re.match(r"^(v_|s_|ds_|global_|buffer_|flat_|scratch_)", bare):
            operation, *rest = bare.split()
            jumps = operation.startswith(("s_cbranch", "s_branch")) and rest
            yield label or str(number), operation, rest[0] if jumps else None
            label = ""
