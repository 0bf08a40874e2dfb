"""Inputs of the experts of a mixture, which transformers keeps as one module for all of a layer.

The module takes the layer's tokens and the experts that each goes to, and has no layers of its own
that could be watched. So what enters its two products is computed a second time, expert by expert.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.planning.selection import LAYER

EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
INTO_DOWN = ("down_proj", "w2")
FEW = 32  # tokens: an expert that fewer go to is looked at with all tokens of the layer


@dataclasses.dataclass(frozen=True)
class ExpertInput:
    """Which of a module's inputs a weight of the checkpoint takes.

    module: that holds all experts of the layer, by name.
    down:   whether it is the product after the activation.
    """

    module: str
    expert: int
    down: bool


def expert_inputs(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, ExpertInput]:
    """The inputs of the checkpoint's weights of experts, by name of the weight.

    shapes: of the weights, by name.

    Weights are left out where a layer has several modules of experts or none, or experts of other
    sizes.
    """
    modules: dict[str, list[str]] = collections.defaultdict(list)
    for name, submodule in model.named_modules():
        if (layer := LAYER.search(f"{name}.")) and _is_known(submodule):
            modules[layer[1]].append(name)
    found = {}
    for name, shape in shapes.items():
        layer, expert = LAYER.search(name), EXPERT.search(name)
        if layer is None or expert is None or len(modules[layer[1]]) != 1:
            continue
        place = ExpertInput(modules[layer[1]][0], int(expert[1]), expert[2] in INTO_DOWN)
        module: Any = model.get_submodule(place.module)
        if place.expert < module.num_experts and shape[1] == _inputs(module, place.down):
            found[name] = place
    return found


def experts_statistics(
    module: Any, tokens: Tensor, chosen: Tensor
) -> list[tuple[InputStatistics, InputStatistics]]:
    """E[x²] of each expert's inputs, and of those of its product after the activation.

    module: all experts of a layer.
    tokens: [T, K];  chosen: experts that each token goes to, [T, n].

    An expert that few tokens go to gets those of all.
    """
    if next(module.parameters()).device.type == "meta":  # accelerate reads them for each call
        module._hf_hook.pre_forward(module)
    found = []
    for expert in range(module.num_experts):
        of_expert = (chosen == expert).any(-1)
        x = tokens[of_expert] if int(of_expert.sum()) >= FEW else tokens
        after = _activated(module, x, expert)
        found.append((_statistics(x), _statistics(after)))
    return found


def _is_known(module: Any) -> bool:
    """Whether transformers' interface for experts describes the module."""
    described = all(
        hasattr(module, name)
        for name in ("num_experts", "has_gate", "has_bias", "is_transposed", "down_proj")
    )
    return described and isinstance(module.down_proj, nn.Parameter) and module.down_proj.ndim == 3


def _inputs(module: Any, down: bool) -> int:
    weight: Tensor = module.down_proj if down else _first(module)
    return weight.shape[1 if module.is_transposed else 2]


def _first(module: Any) -> Tensor:
    """Weights [E, …] of the product before the activation."""
    weight: Tensor = module.gate_up_proj if module.has_gate else module.up_proj
    return weight


def _activated(module: Any, x: Tensor, expert: int) -> Tensor:
    """What an expert makes of tokens before its last product."""
    weight = _first(module)[expert]
    bias = None
    if module.has_bias:
        bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
    out = nn.functional.linear(x, weight.T if module.is_transposed else weight, bias)
    activated: Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    return activated


def _statistics(rows: Tensor) -> InputStatistics:
    return InputStatistics(rows.float().square().mean(0))
