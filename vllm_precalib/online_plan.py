"""What becomes of each layer when an ordinary checkpoint is quantized while it is loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from offline_quantize.method.recipes import Recipe
from offline_quantize.planning import families, selection
from offline_quantize.planning.expert_tensors import MODULES, WHOLE
from offline_quantize.planning.options import Options as RecipeOptions
from offline_quantize.planning.options import RecipeResolver
from precalib_kernels.errors import PrecalibError, ServingError
from vllm_precalib.experts.packed_experts import ExpertMatrix, PackedExperts
from vllm_precalib.packed_module import PackedModule

TYPE = "BF16"  # as selection calls it; every type that vLLM reads is quantized alike


@dataclasses.dataclass(frozen=True)
class OnlineModule:
    """A layer to quantize: how it will be stored, and the recipe that does it."""

    module: PackedModule
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class OnlineExpertPair:
    """Experts to quantize: how they will be stored, and the recipes of their two matrices."""

    packed: PackedExperts
    recipes: tuple[Recipe, Recipe]


class OnlinePlan:
    """The choice that `precalib quantize --activations none` makes, by vLLM's names of layers.

    configs: of the model and of the language model inside.

    Raises ServingError for options that are wrong by themselves, and for a model none of whose
    weights can be packed.
    """

    def __init__(self, options: RecipeOptions, *configs: Mapping[str, Any]) -> None:
        self.head, self.embeddings = bool(options.head), bool(options.embeddings)
        try:
            self.resolver = RecipeResolver(options)
        except PrecalibError as error:
            raise ServingError(f'additional_config: "precalib": {error}') from error
        self.depth = selection.decoder_depth(*reversed(configs))
        self.architectures = families.architectures_of(*configs)
        self.modules: dict[str, None] = {}  # all that were asked for, in their order
        if reason := families.refused(self.architectures):
            raise ServingError(
                f"{reason}, which it cannot do with packed ones; leave out --quantization precalib"
            )
        name = families.unpackable_head(self.architectures)
        if self.head and name:
            raise ServingError(
                f'additional_config: "head": vLLM serves {name} with an unquantized output head '
                'only; leave out "head"'
            )
        kinds = [config.get("model_type") for config in configs]
        self.whole_experts = any(MODULES.get(str(kind)) == WHOLE for kind in kinds)
        if self.embeddings and families.EMBEDDING_MODELS.isdisjoint(kinds):
            raise ServingError(
                f'additional_config: "embeddings": vLLM serves {kinds[0] if kinds else None} with '
                'unquantized embeddings only; leave out "embeddings"'
            )
        self.tied = self.embeddings and any(config.get("tie_word_embeddings") for config in configs)
        if self.tied and (self.head or name):
            why = 'leave out "head"' if self.head else 'leave out "embeddings"'
            raise ServingError(
                'additional_config: "embeddings": this model\'s head is a copy of its embeddings '
                f"and would be packed with them; {why}"
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
        found = self._recipe(prefix, parts, shape)
        if isinstance(found, str):
            return found
        label, recipe = found
        return OnlineModule(PackedModule(recipe.layout, label, parts), recipe)

    def experts(
        self,
        prefix: str,
        count: int,
        shape: tuple[int, int],
        split: tuple[str, ...],
        down: str,
    ) -> OnlineExpertPair | str:
        """How the experts `prefix` are quantized, or why they are not.

        count: number of experts.
        shape: inner and outer size of an expert.
        split, down: what the model calls the modules of an expert before and after the activation.

        Raises ServingError for options that treat experts of one layer differently.
        """
        inner, outer = shape
        matrices, recipes = [], []
        for leaves, size in ((split, (inner, outer)), ((down,), (outer, inner))):
            names = tuple(f"{prefix}.{expert}.{leaf}" for expert in range(count) for leaf in leaves)
            found = self._recipe(prefix, names, size)
            if isinstance(found, str):
                return found
            label, recipe = found
            matrices.append(ExpertMatrix(recipe.layout, label, leaves))
            recipes.append(recipe)
        packed = PackedExperts(prefix, count, matrices[0], matrices[1])
        return OnlineExpertPair(packed, (recipes[0], recipes[1]))

    def check_used(self) -> None:
        """Raise ServingError for a pattern that matches no module, once all are made."""
        shown = ", ".join(list(self.modules)[:2])
        for key, pattern in (
            *(("keep", pattern) for pattern in self.resolver.keep),
            *(("overrides", pattern) for pattern, _, _ in self.resolver.overrides),
        ):
            if key == "keep":
                used = any(pattern.search(module) for module in self.modules)
            else:
                used = pattern.pattern in self.resolver.used
            if not used:
                raise ServingError(
                    f'additional_config: "{key}" {pattern.pattern!r} matches no module'
                    f"{' that is quantized' if key == 'overrides' else ''}; compare it with "
                    f"vLLM's names, as {shown}"
                )

    def _recipe(
        self, prefix: str, parts: Sequence[str], shape: tuple[int, int]
    ) -> tuple[str, Recipe] | str:
        """Label and recipe that all parts of one layer get, or why they stay unquantized."""
        self.modules.update(dict.fromkeys(parts))
        wanted = self.resolver.keep, self.head, self.embeddings, self.architectures
        reasons = [
            selection.classify(f"{part}.weight", shape, TYPE, self.depth, *wanted) for part in parts
        ]
        if len(set(reasons)) > 1 and set(reasons) <= {None, "--keep"}:
            raise self._split(prefix, "keep", parts)
        if reason := next((reason for reason in reasons if reason), None):
            return '"keep"' if reason == "--keep" else reason
        chosen = [self.resolver.recipe_for(part) for part in parts]
        label, recipe = chosen[0]
        if any(other.layout != recipe.layout for _, other in chosen):
            raise self._split(prefix, "overrides", parts)
        return selection.too_narrow(shape[1], recipe.layout.group_size) or (label, recipe)

    def _split(self, prefix: str, key: str, parts: Sequence[str]) -> ServingError:
        named = ", ".join((*parts[:3], "…") if len(parts) > 3 else parts)
        return ServingError(
            f'additional_config: "{key}" treats {named} differently, which vLLM '
            f"computes as one layer ({prefix}); widen or narrow its patterns"
        )
