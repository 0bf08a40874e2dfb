"""Whether a model can go through a pass before it is quantized, seen from its headers."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from offline_quantize.calibration.activations import linear_layers
from offline_quantize.evaluation.models import empty_model
from offline_quantize.planning.activation_options import (
    TOKENS,
    TOKENS_WITH_FEEDBACK,
    ActivationOptions,
)
from offline_quantize.planning.plan import Plan, make_plan
from offline_quantize.planning.selection import within_decoder
from precalib_kernels.errors import PrecalibError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_activations(
    plan: Plan, text: str, tokens: int | None, feedback: bool
) -> tuple[Plan, str | None]:
    """The plan with what goes through its model first, and why nothing does if it was left open.

    text: "none", "random", "self", a file, or "auto": nothing if no recipe gains from it or if
          transformers cannot run the model; else random tokens, with feedback text of its own.
    tokens: how many, None for as many as are enough.

    Raises UsageError for feedback without a text.
    """
    reason = None
    if plan.pairs:
        if feedback or text not in ("auto", "none"):
            raise UsageError(
                "--transform value-output changes the inputs of output projections, of which "
                "nothing is known then; leave it out, or add --activations none"
            )
        return plan, "A transform changes the inputs of output projections."
    if text == "auto":
        gains = feedback or any(
            weight.recipe.layout.column_scale for weight in plan.weight_plans.values()
        )
        reason = why_not(plan) if gains else None
        if feedback and reason is not None:
            raise UsageError(f"--feedback: {reason}; leave out --feedback")
        text = "self" if feedback else "random" if gains and reason is None else "none"
    if text == "none":
        if feedback:
            raise UsageError(
                "--feedback needs to know the inputs of layers; add --activations self"
            )
        return plan, reason
    if tokens is None:
        tokens = TOKENS_WITH_FEEDBACK if feedback else TOKENS
    activations = ActivationOptions(text, tokens, feedback)
    options = dataclasses.replace(plan.options, activations=activations)
    if options.target_bits is not None:  # a mix goes by what will be known
        return make_plan(plan.source, options), None
    return dataclasses.replace(plan, options=options), None


def why_not(plan: Plan) -> str | None:
    """Why transformers cannot run a plan's model, in a few words; None if it can.

    Nothing is read but configuration and headers.
    """
    try:
        model = empty_model(plan.source.root)
    except PrecalibError as error:
        return str(error)
    shapes = {name: weight.entry.shape for name, weight in plan.weight_plans.items()}
    inside = [name for name in shapes if within_decoder(name)]
    found = linear_layers(model, shapes)
    if inside and not found:
        return (
            f"{plan.source.root}: transformers' {type(model).__name__} has no linear layer of the "
            f"name and shape of '{inside[0]}' or any other weight; does config.json belong to it?"
        )
    if missing := _missing(model, list(plan.source.locations)):
        return f"{plan.source.root}: transformers wants a tensor '{missing}'"
    return None


def _missing(model: "PreTrainedModel", names: Sequence[str]) -> str | None:
    """A parameter for which the checkpoint has no tensor."""
    there = {_tail(name) for name in names}
    for name, _ in model.named_parameters():
        if name.endswith((".weight", ".bias")) and _tail(name) not in there:
            return name
    return None


def _tail(name: str) -> str:
    """A name from its layer's number on; of others the last two parts, as "norm.weight"."""
    return within_decoder(name) or ".".join(name.split(".")[-2:])
