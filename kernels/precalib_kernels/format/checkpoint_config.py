"""`quantization_config` of a checkpoint's config.json: one class for its writer and its reader."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from precalib_kernels.errors import FormatError
from precalib_kernels.format.expert_tensors import ExpertTensor
from precalib_kernels.format.layout import FORMAT_VERSION, Layout

QUANT_METHOD = "precalib"
# Stands among the layouts and names the optional keys that a reader must know. Readers that know no
# optional key take it for a layout with unknown fields, and refuse the checkpoint for them.
REQUIRED = "required"
REQUIRED_KEYS = ("expert_tensors",)


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
    expert_tensors: 3-D tensors that were packed as modules, by name.
    """

    recipe: str
    layouts: Mapping[str, Layout]
    modules: Mapping[str, str]
    kept: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expert_tensors: Mapping[str, ExpertTensor] = dataclasses.field(default_factory=dict)

    def layout_of(self, module: str) -> Layout | None:
        """Layout of a packed module, None for any other."""
        name = self.modules.get(module)
        return None if name is None else self.layouts[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; optional keys only where they say something."""
        layouts: dict[str, Any] = {name: layout.to_dict() for name, layout in self.layouts.items()}
        if self.expert_tensors:
            layouts[REQUIRED] = {"expert_tensors": True}
        fields = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe,
            "layouts": layouts,
            "modules": dict(self.modules),
            "kept": list(self.kept),
        }
        if self.tied:
            fields["tied"] = dict(self.tied)
        if self.expert_tensors:
            fields["expert_tensors"] = {n: t.to_dict() for n, t in self.expert_tensors.items()}
        return fields

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
            if name == REQUIRED:
                _check_required(layout)
                continue
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
            known = isinstance(other, str) and other in fields["modules"]
            if module in fields["modules"] or not known:
                raise FormatError(
                    f"quantization_config: module {module!r} cannot be tied to {other!r}"
                )
        modules = dict(fields["modules"])
        experts = _expert_tensors(fields.get("expert_tensors", {}), modules)
        return cls(fields["recipe"], layouts, modules, tuple(kept), dict(tied), experts)


def _check_required(keys: Mapping[str, Any]) -> None:
    """Raise FormatError for a key that a reader must know and this one does not."""
    if unknown := sorted(set(keys) - set(REQUIRED_KEYS)):
        raise FormatError(
            f"quantization_config needs a reader that knows the key {unknown[0]!r}; install the "
            "precalib that wrote the checkpoint, or a newer one"
        )


def _expert_tensors(fields: Any, modules: Mapping[str, str]) -> dict[str, ExpertTensor]:
    """The value of "expert_tensors". Raises FormatError unless all their modules are packed."""
    if not isinstance(fields, Mapping):
        raise FormatError("quantization_config: 'expert_tensors' is not an object")
    found: dict[str, ExpertTensor] = {}
    for name, tensor in fields.items():
        if not isinstance(tensor, Mapping):
            raise FormatError(f"quantization_config: expert tensor {name!r} is not an object")
        try:
            found[name] = ExpertTensor.from_dict(tensor)
        except FormatError as error:
            raise FormatError(f"quantization_config: {name!r}: {error}") from error
        if found[name].shape[0] > len(modules):  # a number of any size may stand there
            raise FormatError(f"quantization_config: {name!r} has more experts than are packed")
        for part in found[name].parts():
            if part.module not in modules:
                raise FormatError(
                    f"quantization_config: {name!r} is made of {part.module!r}, which is not packed"
                )
    return found
