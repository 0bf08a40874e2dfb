"""`quantization_config` of a checkpoint's config.json: one class for its writer and its reader."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from precalib_kernels.errors import FormatError
from precalib_kernels.format.layout import FORMAT_VERSION, Layout

QUANT_METHOD = "precalib"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which modules are packed, and how.

    recipe:  name of the recipe the checkpoint was made with, for people.
    layouts: the layouts in use, by name.
    modules: name of the layout of every packed module, by the module's name in the checkpoint
             ("model.layers.0.self_attn.q_proj"). A module that is not listed is not packed.
    kept:    linear modules left in their original type, for people.
    tied:    modules without tensors of their own, by name: each uses those of another packed
             module. {"lm_head": "model.embed_tokens"} for a head that is its packed embeddings.
    """

    recipe: str
    layouts: Mapping[str, Layout]
    modules: Mapping[str, str]
    kept: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def layout_of(self, module: str) -> Layout | None:
        """Layout of a packed module, None for any other."""
        name = self.modules.get(module)
        return None if name is None else self.layouts[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        fields = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe,
            "layouts": {name: layout.to_dict() for name, layout in self.layouts.items()},
            "modules": dict(self.modules),
            "kept": list(self.kept),
        }
        return {**fields, "tied": dict(self.tied)} if self.tied else fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CheckpointConfig":
        """Inverse of `to_dict`.

        Raises FormatError for another method or version, a missing key, or a module whose
        layout is not defined.
        """
        method, version = fields.get("quant_method"), fields.get("format_version")
        if method != QUANT_METHOD:
            raise FormatError(f"quantization_config has quant_method {method!r}, not 'precalib'")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"quantization_config has format_version {version!r}, this precalib reads "
                f"{FORMAT_VERSION}; install the precalib that wrote the checkpoint, "
                "or quantize again"
            )
        for key, kind in (("recipe", str), ("layouts", Mapping), ("modules", Mapping)):
            if not isinstance(fields.get(key), kind):
                raise FormatError(f"quantization_config lacks {key!r}; quantize the model again")
        layouts = {}
        for name, layout in fields["layouts"].items():
            if not isinstance(layout, Mapping):
                raise FormatError(f"quantization_config: layout {name!r} is not an object")
            try:
                layouts[name] = Layout.from_dict(layout)
            except FormatError as error:
                raise FormatError(f"quantization_config: {name!r}: {error}") from error
        for name in (*layouts, *fields["modules"]):
            if not name.isprintable():
                raise FormatError(f"quantization_config: {name[:60]!a} is not a name")
        for module, name in fields["modules"].items():
            if not isinstance(name, str) or name not in layouts:
                raise FormatError(
                    f"quantization_config: module {module!r} has the undefined layout {name!r}"
                )
        kept = fields.get("kept", [])
        if not isinstance(kept, list):
            raise FormatError("quantization_config: 'kept' is not a list")
        tied = fields.get("tied", {})
        if not isinstance(tied, Mapping):
            raise FormatError("quantization_config: 'tied' is not an object")
        for module, other in tied.items():
            if module in fields["modules"] or other not in fields["modules"]:
                raise FormatError(
                    f"quantization_config: module {module!r} cannot be tied to {other!r}"
                )
        return cls(fields["recipe"], layouts, dict(fields["modules"]), tuple(kept), dict(tied))
