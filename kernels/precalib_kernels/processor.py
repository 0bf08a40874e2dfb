"""What this machine's processor is called and can do."""

from pathlib import Path

CPU_INFORMATION = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, ARM


def has_bfloat16(information: Path = CPU_INFORMATION) -> bool:
    """Whether the processor multiplies bfloat16; no if it does not say so."""
    try:
        lines = information.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not BFLOAT16_FLAGS.isdisjoint(flags.split())
    return False


def processor_name(information: Path = CPU_INFORMATION) -> str | None:
    """Name of the model; None if the processor does not say it."""
    try:
        lines = information.read_text().splitlines()
    except OSError:
        return None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
