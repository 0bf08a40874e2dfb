"""What becomes of each layer when an ordinary checkpoint is quantized while it is loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from offline_quantize.method.recipes import Recipe
from offline_quantize.planning import families, selection
from offline_quantize.planning.options import Options as RecipeOptions
from offline_quantize.planning.options import RecipeResolver
from precalib_kernels.errors import PrecalibError, ServingError
from vllm_precalib.packed_module import PackedModule

TYPE = "BF16"  # as selection calls it; every type that vLLM reads is quantized alike


@dataclasses.dataclass(frozen=True)
class OnlineModule:
    """A layer to quantize: how it will be stored, and the recipe that does it."""

    module: PackedModule
    recipe: Recipe


class OnlinePlan:
    """The choice that `precalib quantize --activations none` makes, by vLLM's names of layers.

    configs: of the model and of the language model inside.

    Raises ServingError for options that are wrong by themselves.
    """

    def __init__(self, options: RecipeOptions, *configs: Mapping[str, Any]) -> None:
        self.head = bool(options.head)
        try:
            self.resolver = RecipeResolver(options)
        except PrecalibError as error:
            raise ServingError(f'additional_config: "precalib": {error}') from error
        self.depth = selection.decoder_depth(*reversed(configs))
        name = families.unpackable_head(families.architectures_of(*configs))
        if self.head and name:
            raise ServingError(
                f'additional_config: "head": vLLM serves {name} with an unquantized output head '
                'only; leave out "head"'
            )

    def module(
        self, prefix: str, shape: tuple[int, int], fused: Mapping[str, Sequence[str]]
    ) -> OnlineModule | str:
        """How the layer `prefix` is quantized, or why it is not.

        shape: N and K of the whole layer.
        fused: what the model class fuses, as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.

        Raises ServingError for options that treat parts of one layer differently.
        """
        parent, dot, leaf = prefix.rpartition(".")
        parts = tuple(parent + dot + part for part in fused.get(leaf) or (leaf,))
        reasons = [
            selection.classify(
                f"{part}.weight", shape, TYPE, self.depth, self.resolver.keep, self.head
            )
            for part in parts
        ]
        if len(set(reasons)) > 1 and set(reasons) <= {None, "--keep"}:
            raise self._split(prefix, "keep", parts)
        if reason := next((reason for reason in reasons if reason), None):
            return '"keep"' if reason == "--keep" else reason
        chosen = [self.resolver.recipe_for(part) for part in parts]
        label, recipe = chosen[0]
        if any(other.layout != recipe.layout for _, other in chosen):
            raise self._split(prefix, "overrides", parts)
        if reason := selection.too_narrow(shape[1], recipe.layout.group_size):
            return reason
        return OnlineModule(PackedModule(recipe.layout, label, parts), recipe)

    def _split(self, prefix: str, key: str, parts: Sequence[str]) -> ServingError:
        return ServingError(
            f'additional_config: "{key}" treats {", ".join(parts)} differently, which vLLM '
            f"computes as one layer ({prefix}); widen or narrow its patterns"
        )
