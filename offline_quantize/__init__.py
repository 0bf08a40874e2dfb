"""The offline quantizer: its Python API, described in docs/python-api.md, and the rooms behind it.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offline_quantize.api import (
        PrecalibError,
        dequantize_checkpoint,
        dequantize_weight,
        evaluate_checkpoint,
        find_recipe,
        list_recipes,
        open_packed,
        quantize_checkpoint,
        quantize_weight,
        verify_checkpoint,
    )

__all__ = [
    "PrecalibError",
    "dequantize_checkpoint",
    "dequantize_weight",
    "evaluate_checkpoint",
    "find_recipe",
    "list_recipes",
    "open_packed",
    "quantize_checkpoint",
    "quantize_weight",
    "verify_checkpoint",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from offline_quantize import api

        return getattr(api, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
