"""The vLLM plugin: `--quantization precalib`."""


def register() -> None:
    """x"""
