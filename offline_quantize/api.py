"""The public Python API, as `offline_quantize` exports it: one function per command, and weights.

Sources are folders or Hugging Face ids; what is wrong with an input is a PrecalibError whose text
says where and what to do.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor

from offline_quantize.calibration.choice import choose_activations
from offline_quantize.checkpoint import hub
from offline_quantize.checkpoint.packed import PackedCheckpoint
from offline_quantize.checkpoint.packed import open_packed as _open_packed
from offline_quantize.checkpoint.progress import NullProgress, Progress
from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.commands.dequantize import dequantize
from offline_quantize.commands.quantize import Outcome, check_cluster, quantize
from offline_quantize.commands.verify import verify
from offline_quantize.device import check_device
from offline_quantize.method import recipes
from offline_quantize.method.encode import Encoded, encode
from offline_quantize.method.recipes import DEFAULT, Recipe
from offline_quantize.planning.options import Options
from offline_quantize.planning.plan import make_plan
from precalib_kernels.errors import PrecalibError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout

if TYPE_CHECKING:
    from offline_quantize.evaluation.result import EvaluationResult

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


class RecipeChanges(TypedDict, total=False):
    """Values that take the place of a recipe's own.

    bits:         of a base code: 2, 3, 4 or 5.
    group_size:   weights that share a scale, a multiple of 32.
    alpha:        share of salient weights, 0.05 for 5 %.
    salient_bits: of a salient code, `bits` to 8.
    clip:         share of the non-salient range that a min-max grid covers.
    """

    bits: int | None
    group_size: int | None
    alpha: float | None
    salient_bits: int | None
    clip: float | None


def list_recipes() -> dict[str, Recipe]:
    """All recipes by name; `Recipe.describe()` is a line about one."""
    return dict(recipes.RECIPES)


def find_recipe(name: str = DEFAULT, **changes: Unpack[RecipeChanges]) -> Recipe:
    """The recipe of that name, with `changes` in place of its own values.

    Raises PrecalibError for an unknown name, and for values that do not fit together.
    """
    return recipes.adjust(recipes.find(name), **changes)


def quantize_weight(
    weight: Tensor, recipe: str | Recipe = DEFAULT, *, name: str = "weight"
) -> Encoded:
    """Quantize and pack one weight where it lies, on the CPU or a GPU.

    weight:  [N, K] with K a multiple of 32, bfloat16, float16 or float32.
    recipe:  its name, or what `find_recipe` returned.
    name:    begins the text of an error.
    returns: `tensors` by name and their `layout`, as docs/format.md describes them, and
             `statistics`, whose `summary()` has the relative error ‖W − Ŵ‖² / ‖W‖².

    Raises PrecalibError for weights that are not finite or that the recipe cannot hold.
    """
    return encode(weight, recipes.find(recipe) if isinstance(recipe, str) else recipe, name)


def dequantize_weight(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The weight Ŵ [N, K], float32, that packed tensors stand for.

    tensors, layout: as `quantize_weight` returns them, or `PackedCheckpoint.tensors` and `.layout`.

    Raises PrecalibError when they do not fit together or are damaged.
    """
    columns = 8 * tensors["qweight"].shape[1] // layout.bits if "qweight" in tensors else 0
    layout.check(tensors, columns, "packed weight")
    return reference.dequantize(tensors, layout, columns)


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str | None = None,
    *,
    target_bits: float | None = None,
    overrides: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    head: str | None = None,
    embeddings: str | None = None,
    activations: str | Path = "auto",
    activation_tokens: int | None = None,
    feedback: bool = False,
    transform: str | None = None,
    card: bool = True,
    jobs: int = 0,
    device: str = "cpu",
    ray: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **changes: Unpack[RecipeChanges],
) -> Outcome:
    """Quantize a checkpoint, as `precalib quantize` does: to the same bytes.

    target:      folder to write; must be new unless `resume` continues an unfinished run.
    recipe:      name of the main recipe, None for the default; `changes` adjust it.
    target_bits: effective bits per weight that all together may take, in place of a recipe.
    overrides:   recipe names by pattern, searched in module names; the first match wins.
    keep:        patterns of modules that stay unquantized.
    head:        name of a recipe for the output head, None to leave it unquantized.
    embeddings:  name of a recipe for the input embeddings, and for the head of a model that shares
                 them if `head` names no other; None to leave them unquantized.
    activations: what goes through the model first, to know the inputs of its layers: "random"
                 tokens, text of its own ("self"), a text file, or nothing ("none"). "auto" is
                 "random" if transformers can run the model; the manifest says what was done.
    activation_tokens: how many tokens of it; None for as many as are enough.
    feedback:    whether codes take up the errors of the codes before them; needs activations.
    transform:   "value-output" to transform pairs of weights first, None for nothing.
    card:        whether a model card takes the place of the source's README.md.
    jobs:        tensors at a time; 0 for one per core.
    device:      where to compute: "cpu", "cuda:0".
    ray:         address of a Ray cluster whose CPUs work in place of this machine's, or "auto";
                 its machines have to see source and target under the same paths.
    progress:    is told of every tensor and of the bytes done.
    returns:     the manifest that was written, and the seconds it took.

    Raises PrecalibError; nothing is written if the fault can be seen beforehand.
    """
    given = dict.fromkeys(RecipeChanges.__annotations__) | changes  # in the order of their label
    replaced = list((overrides or {}).items())
    options = Options(
        recipe,
        given,
        replaced,
        keep,
        target_bits,
        head,
        embeddings=embeddings,
        transform=transform,
        card=card,
    )
    check_cluster(ray, jobs, device)
    check_device(device)
    root, target = hub.locate(str(source)), Path(target)
    if ray is not None:  # other machines know no paths relative to a folder of this one
        root, target = root.absolute(), target.absolute()
    plan = make_plan(open_checkpoint(root), options)
    plan, _ = choose_activations(plan, str(activations), activation_tokens, feedback)
    shown = progress or NullProgress()
    return quantize(plan, target, shown, _jobs(jobs), device, resume, ray)


def dequantize_checkpoint(
    directory: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    jobs: int = 0,
    progress: Progress | None = None,
) -> int:
    """Turn a packed checkpoint back into one that transformers loads; returns its size in bytes.

    target: folder to write; an unfinished one is continued.
    dtype:  of the weights that were packed.
    jobs:   tensors at a time; 0 for one per core.

    Raises PrecalibError.
    """
    shown = progress or NullProgress()
    return dequantize(Path(directory), Path(target), dtype, _jobs(jobs), shown)


def verify_checkpoint(
    directory: str | Path,
    against: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> list[str]:
    """What is wrong with a packed checkpoint, a sentence per fault; nothing if it is sound.

    against: the source checkpoint: every error is computed again and compared.

    Raises PrecalibError when a checkpoint cannot be read at all.
    """
    source = hub.locate(str(against)) if against is not None else None
    return list(verify(Path(directory), source, progress or NullProgress()))


def evaluate_checkpoint(
    directory: str | Path,
    against: str | Path,
    *,
    text: Sequence[str | Path] = (),
    self_generated: bool = False,
    tokens: int = 8192,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    begin_token: bool = False,
) -> "EvaluationResult":
    """Compare a packed checkpoint with its source: KL divergence, agreement, perplexity, tasks.

    text:           files to measure on;  self_generated: or let the source write the text.
    tokens:         number to take of all texts together, or to write.
    tasks:          files of multiple-choice questions;  limit: questions to take of each.
    dtype, device:  to compute in, and where; without a type, bfloat16, or float32 on a processor
                    without bfloat16 arithmetic.
    begin_token:    put the model's begin token before texts if its tokenizer does not.
    returns:        what was measured; its `to_json()` is what `precalib eval --json` writes.

    Needs transformers. Raises PrecalibError.
    """
    from offline_quantize.evaluation.command import Request, evaluate

    check_device(device)
    request = Request(
        [Path(file) for file in text],
        self_generated,
        tokens,
        [Path(file) for file in tasks],
        limit,
        dtype,
        device,
        begin_token,
    )
    return evaluate(Path(directory), hub.locate(str(against)), request)


def open_packed(directory: str | Path) -> PackedCheckpoint:
    """Open a packed checkpoint; headers are read now, tensors when they are asked for.

    Raises PrecalibError for anything that is not one.
    """
    return _open_packed(Path(directory))


def _jobs(jobs: int) -> int:
    return jobs or len(os.sched_getaffinity(0))
