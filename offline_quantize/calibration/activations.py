"""Input statistics of linear layers: one forward pass over some text, block by block.

All windows of the text go through the model as one batch, so each block is needed once. A model
that is larger than memory has its blocks read from the checkpoint when their turn comes and dropped
after it (`model.model_for_pass`). What is known of a block's inputs is handed over as soon as the
block is through, and the pass waits meanwhile: the Hessians of one block are all that exist.
"""

import collections
import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.calibration.expert_inputs import ExpertInput, experts_statistics
from offline_quantize.evaluation.models import input_device
from offline_quantize.method.input_statistics import InputStatistics
from offline_quantize.planning.selection import LAYER, within_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Block = tuple[str, Mapping[str, InputStatistics]]

EXPERTS_ARGUMENTS = ("hidden_states", "top_k_index")  # of transformers' modules of experts
PANEL = 128  # columns of a Hessian at once


class _Stopped(BaseException):
    """The consumer wants no more blocks."""


def observe(
    model: "PreTrainedModel",
    windows: Sequence[Tensor],
    layers: Mapping[str, str],
    *,
    experts: Mapping[str, ExpertInput] = {},
    head: str | None = None,
    hessians: bool = False,
    threads: int = 1,
) -> Generator[Block]:
    """Each block's name, and the input statistics of its weights by name, in the model's order.

    windows:  token ids, int64 [n], all of one length.
    layers:   of the wanted weights: the model's module of each, by name (`linear_layers`).
    experts:  of the wanted weights of experts: which input each takes (`expert_inputs`).
    head:     name of the output head's weight, if it is wanted, too; a block of its own, the last.
    hessians: whether E[x·xᵀ] is wanted, too; of experts it never is.
    threads:  of the processor for the pass; while a block is looked at, torch is set to one.

    The statistics are float32, on the device of the layer. The pass stands still while a block is
    looked at, and ends when the iterator is closed.
    """
    found: queue.Queue[Block | BaseException | None] = queue.Queue(1)
    resume = threading.Semaphore(0)
    recorder = _Recorder(hessians)
    hooks = []
    stopped = threading.Event()

    def hand_over(block: str, statistics: Mapping[str, InputStatistics]) -> None:
        torch.set_num_threads(1)  # new threads of the consumer's pool take it over
        found.put((block, statistics))
        resume.acquire()
        if stopped.is_set():
            raise _Stopped
        torch.set_num_threads(threads)

    def run() -> None:
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                tokens = torch.stack(list(windows)).to(input_device(model))
                hidden = model.base_model(tokens, use_cache=False).last_hidden_state
                if head is not None:
                    hand_over("head", {head: input_statistics(hidden, hessians)})
            torch.set_num_threads(1)
            found.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # of any model class: raised again by the consumer
            found.put(error)

    for name, layer in layers.items():
        hooks.append(model.get_submodule(layer).register_forward_pre_hook(recorder.hook(name)))
    for holder, places in _by_module(experts).items():
        hooks.append(
            model.get_submodule(holder).register_forward_pre_hook(
                recorder.expert_hook(places), with_kwargs=True
            )
        )
    modules = [*layers.values(), *(place.module for place in experts.values())]
    for block in dict.fromkeys(map(_block, modules)):
        module = model.get_submodule(block)
        hooks.append(
            module.register_forward_hook(lambda *_, block=block: hand_over(block, recorder.take()))
        )
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            resume.release()
    finally:
        stopped.set()
        resume.release()
        thread.join()
        for hook in hooks:
            hook.remove()


def linear_layers(model: torch.nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The model's module for each of the checkpoint's weights, by name of the weight.

    shapes: of the weights, by name.

    A module is that of a weight if their names agree from the layer's number on, and their shapes:
    transformers and a checkpoint may differ in what comes before. Weights that fit several modules
    or none are left out, and so are several weights that fit one module, but for its namesake.
    """
    modules: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, module in model.named_modules():
        if (tail := within_decoder(f"{name}.weight")) and isinstance(module, torch.nn.Linear):
            modules.setdefault((tail, tuple(module.weight.shape)), []).append(name)
    found, exact = {}, set()
    for name, shape in shapes.items():
        fitting = modules.get((within_decoder(name) or "", tuple(shape)), [])
        same = [module for module in fitting if f"{module}.weight" == name]
        exact.update(same)
        if len(chosen := same or fitting) == 1:
            found[name] = chosen[0]
    claims = collections.Counter(found.values())
    return {
        name: module
        for name, module in found.items()
        if f"{module}.weight" == name or (claims[module] == 1 and module not in exact)
    }


class _Recorder:
    """Collects statistics of inputs; layers that share an input share its statistics."""

    def __init__(self, hessians: bool) -> None:
        self.hessians = hessians
        self.found: dict[str, InputStatistics] = {}
        self.last: tuple[Tensor, InputStatistics] | None = None

    def hook(self, name: str) -> Any:
        def record(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if self.last is None or self.last[0] is not x:
                self.last = x, input_statistics(x, self.hessians)
            self.found[name] = self.last[1]

        return record

    def expert_hook(self, places: Mapping[str, ExpertInput]) -> Any:
        def record(module: torch.nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
            inputs = dict(zip(EXPERTS_ARGUMENTS, given, strict=False)) | dict(named)
            of_experts = experts_statistics(module, *(inputs[key] for key in EXPERTS_ARGUMENTS))
            for name, place in places.items():
                self.found[name] = of_experts[place.expert][place.down]

        return record

    def take(self) -> dict[str, InputStatistics]:
        """What was found since the last time."""
        found, self.found, self.last = self.found, {}, None
        return found


def input_statistics(x: Tensor, hessian: bool) -> InputStatistics:
    """Moments of inputs x [..., K] over all that comes before the last dimension."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if not hessian:
        return InputStatistics(rows.square().mean(0))
    with _bfloat16_products() if x.dtype == torch.bfloat16 else contextlib.nullcontext():
        moments = _second_moments(rows)
    return InputStatistics(moments.diagonal().clone(), moments)


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Within, float32 matrices are multiplied in bfloat16 where the CPU can, and added in float32.

    For numbers that are bfloat16 that is as exact, and twice as fast or more. The setting is one of
    the process; nothing else multiplies while the pass goes on.
    """
    backend: Any = torch.backends.mkldnn  # its types do not tell of this setting
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def _second_moments(rows: Tensor) -> Tensor:
    """E[x·xᵀ] of rows x: panel by panel from the diagonal on, the rest is its mirror image."""
    count, size = rows.shape
    moments = rows.new_empty(size, size)
    for first in range(0, size, PANEL):
        last = first + PANEL
        panel = rows[:, first:last].T @ rows[:, first:]
        moments[first:last, first:] = panel.div_(count)
        moments[last:, first:last] = panel[:, PANEL:].T
    return moments


def _by_module(experts: Mapping[str, ExpertInput]) -> dict[str, dict[str, ExpertInput]]:
    """Weights of experts by the module that holds them."""
    found: dict[str, dict[str, ExpertInput]] = {}
    for name, place in experts.items():
        found.setdefault(place.module, {})[name] = place
    return found


def _block(module: str) -> str:
    """The block of the model that a module lies in."""
    match = LAYER.search(f"{module}.")
    assert match
    return module[: match.end() - 1]
