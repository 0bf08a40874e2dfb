"""What `precalib quantize --activations` learns before and while it encodes."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from offline_quantize.calibration.activations import Block, linear_layers, observe
from offline_quantize.calibration.model import model_for_pass
from offline_quantize.calibration.text import own_text, random_tokens, text_of_file
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.source import Checkpoint
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.planning.activation_options import ActivationOptions
from offline_quantize.planning.selection import HEAD, LAYER, module_of
from precalib_kernels.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


REMEDY = "quantize with --activations none"


@dataclasses.dataclass(frozen=True)
class Observation:
    """A model and a text, ready for the pass.

    windows: token ids, int64 [n], all of one length.
    layers:  the model's module of each weight whose inputs will be known, by name.
    head:    name of the output head's weight if it is to be quantized, too.
    unknown: names of the others in decoder layers.
    """

    model: "PreTrainedModel"
    windows: Sequence[Tensor]
    layers: Mapping[str, str]
    head: str | None
    unknown: Sequence[str]
    options: ActivationOptions
    progress: Progress

    def blocks(self) -> Generator[Block]:
        """The input statistics of each block in turn."""
        hessians = self.options.feedback
        blocks = observe(self.model, self.windows, self.layers, head=self.head, hessians=hessians)
        with contextlib.closing(blocks):
            for block in blocks:
                self.progress.begin(f"inputs of {block[0]}")
                yield block

    def inputs(self) -> Mapping[str, InputStatistics]:
        """The input statistics of all blocks together."""
        return {name: found for _, block in self.blocks() for name, found in block.items()}


@contextlib.contextmanager
def observation(
    source: Checkpoint,
    shapes: Mapping[str, Sequence[int]],
    options: ActivationOptions,
    device: str,
    progress: Progress,
) -> Iterator[Observation]:
    """Load the model and get the text.

    shapes: of the weights that are to be quantized, by name.

    Raises SourceError when transformers cannot load the model or its layers have other names than
    all these weights, and what making the text raises.
    """
    with contextlib.ExitStack() as stack:
        progress.begin("model for a forward pass")
        try:
            model = stack.enter_context(model_for_pass(source.root, device))
        except SourceError as error:
            raise SourceError(f"{error}; {REMEDY}") from error
        layers = linear_layers(model, shapes)
        if not layers:
            raise SourceError(
                f"{source.root}: transformers' {type(model).__name__} has no layer for "
                f"'{next(iter(shapes))}' or any other weight; {REMEDY}"
            )
        unknown = [name for name in shapes if name not in layers and LAYER.search(name)]
        progress.begin("text for the model")
        windows = _text(model, source.root, options)
        head = next((name for name in shapes if HEAD.search(module_of(name))), None)
        yield Observation(model, windows, layers, head, unknown, options, progress)


def _text(model: "PreTrainedModel", root: Path, options: ActivationOptions) -> list[Tensor]:
    if options.text == "random":
        return random_tokens(model, options.tokens)
    if options.text == "self":
        return own_text(model, options.tokens)
    return text_of_file(model, root, Path(options.text), options.tokens)
