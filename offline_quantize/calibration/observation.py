"""What `precalib quantize --activations` learns before and while it encodes."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offline_quantize.calibration.activations import Block, linear_layers, observe
from offline_quantize.calibration.expert_inputs import EXPERT, ExpertInput, expert_inputs
from offline_quantize.calibration.model import free_memory, model_for_pass
from offline_quantize.calibration.text import own_text, random_tokens, text_of_file
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.source import Checkpoint
from offline_quantize.evaluation.models import errors_of_the_model
from offline_quantize.method.feedback_factor import feedback_bytes
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.planning.activation_options import ActivationOptions
from offline_quantize.planning.selection import LAYER
from precalib_kernels.errors import SourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = "quantize with --activations none"


@dataclasses.dataclass(frozen=True)
class Observation:
    """A model and a text, ready for the pass.

    root:    folder of the checkpoint, for errors.
    windows: token ids, int64 [n], all of one length.
    layers:  the model's module of each weight whose inputs will be known, by name.
    experts: which inputs each weight of an expert takes, by name.
    head:    name of the output head's weight if it is to be quantized, too.
    unknown: names of the others in decoder layers.
    threads: for the pass.
    """

    root: Path
    model: "PreTrainedModel"
    windows: Sequence[Tensor]
    layers: Mapping[str, str]
    experts: Mapping[str, ExpertInput]
    head: str | None
    unknown: Sequence[str]
    options: ActivationOptions
    progress: Progress
    threads: int

    def blocks(self) -> Generator[Block]:
        """The input statistics of each block in turn.

        Raises SourceError when the model fails or its inputs are not finite.
        """
        observed = observe(
            self.model,
            self.windows,
            self.layers,
            experts=self.experts,
            head=self.head,
            hessians=self.options.feedback,
            threads=self.threads,
        )
        with contextlib.closing(observed) as blocks:
            while True:
                with errors_of_the_model(self.root, REMEDY):
                    block = next(blocks, None)
                if block is None:
                    return
                self.progress.begin(f"inputs of {block[0]}")
                self._check_finite(block[1])
                yield block

    def inputs(self) -> Mapping[str, InputStatistics]:
        """The input statistics of all blocks together."""
        try:
            return {name: found for _, block in self.blocks() for name, found in block.items()}
        finally:
            torch.set_num_threads(self.threads)

    def _check_finite(self, block: Mapping[str, InputStatistics]) -> None:
        for name, found in block.items():
            if not bool(found.mean_square.isfinite().all()):
                raise SourceError(
                    f"{self.root}: the inputs of '{name}' are not finite when the model runs; a "
                    f"tensor before it is damaged: download the checkpoint again, or {REMEDY}"
                )


@contextlib.contextmanager
def observation(
    source: Checkpoint,
    shapes: Mapping[str, Sequence[int]],
    head: str | None,
    options: ActivationOptions,
    device: str,
    progress: Progress,
) -> Iterator[Observation]:
    """Load the model and get the text.

    shapes: of the weights that are to be quantized, by name.
    head:   which of them logits are computed with, None if none is.

    Raises SourceError when transformers cannot load or run the model or its layers have other names
    than all these weights, UsageError when memory is too small for error feedback, and what reading
    a text raises.
    """
    threads = torch.get_num_threads()
    if options.feedback:
        _check_memory(source.root, shapes, device)
    with contextlib.ExitStack() as stack:
        progress.begin("model for a forward pass")
        try:
            model = stack.enter_context(model_for_pass(source.root, device))
        except SourceError as error:
            raise SourceError(f"{str(error).rstrip('?')}; {REMEDY}") from error
        layers = linear_layers(model, shapes)
        experts = expert_inputs(model, shapes)
        if not layers:
            raise SourceError(
                f"{source.root}: transformers' {type(model).__name__} has no layer for "
                f"'{next(iter(shapes))}' or any other weight; {REMEDY}"
            )
        if options.file is None:  # windows are short: plain products are faster than fused ones
            model.set_attn_implementation("eager")
        progress.begin("text for the model")
        with errors_of_the_model(source.root, REMEDY):
            windows = _text(model, source.root, options)
        known = layers.keys() | experts.keys()
        unknown = [name for name in shapes if name not in known and LAYER.search(name)]
        yield Observation(
            source.root, model, windows, layers, experts, head, unknown, options, progress, threads
        )


def _check_memory(root: Path, shapes: Mapping[str, Sequence[int]], device: str) -> None:
    """Raise UsageError if the Hessian of one weight alone, with its factor, is too large."""
    columns = {name: shape[1] for name, shape in shapes.items() if not EXPERT.search(name)}
    if not columns:
        return
    name = max(columns, key=lambda name: columns[name])
    needed, free = feedback_bytes(columns[name]), free_memory(device)
    if needed > free:
        raise UsageError(
            f"{root}: error feedback takes {needed / 1e9:.1f} GB of memory for '{name}' alone, "
            f"which has {columns[name]:,} inputs, and {free / 1e9:.1f} GB are free; leave out "
            "--feedback"
        )


def _text(model: "PreTrainedModel", root: Path, options: ActivationOptions) -> list[Tensor]:
    if options.file is not None:
        return text_of_file(model, root, options.file, options.tokens)
    if options.text == "self":
        return own_text(model, options.tokens)
    return random_tokens(model, options.tokens)
