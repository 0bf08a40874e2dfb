"""turbopress 0.5.2 (PyPI): folds, rotation and a trellis of 64 states, with and without data.

Its own code for each matrix and its own rule for the folds. With data, as it does by default: error
feedback over the trellis with the Hessian of each block's inputs behind the blocks that are already
quantized, fold exponent 1/8. Without data: no feedback, and folds from the columns' norms alone,
which is the exponent 0. Its search runs on a compiled copy that makes the same choices.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_text import evenly_spread
from torch import Tensor

CALIBRATED, DATA_FREE = "turbopress", "turbopress, no data"
STATES, FLOAT16 = 64, 16
LANES = 32
Found = tuple[dict[str, Tensor], dict[str, int]]  # weights and stored bits, by name


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A point; windows: how many of 512 tokens it sees, 8 by its default, 0 without data."""

    bits: int
    windows: int

    @property
    def method(self) -> str:
        """Its name."""
        return CALIBRATED if self.windows else DATA_FREE

    @property
    def variant(self) -> str:
        """Its name beside the method's."""
        return f"{self.bits} bits" + (f", {self.windows} windows" if self.windows else "")


SCHEMES = tuple(Scheme(bits, windows) for bits in (2, 3, 4, 5) for windows in (0, 8, 32))


@torch.no_grad()
def make(scheme: Scheme, source: Path, calibration: Path | None) -> Found:
    """Quantize a model: its weights by name, and the bits stored for each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from turbopress import pipeline

    pipeline._viterbi = search
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    layers, path = pipeline.decoder_layers(model)
    batches, scales = [], {}
    if calibration:
        tokenizer = AutoTokenizer.from_pretrained(source)
        windows = evenly_spread(tokenizer, calibration.read_text(), scheme.windows)
        batches = list(torch.tensor(windows).split(2))
        scales = pipeline.collect_channel_stats(model.model, layers, batches, "cpu")
    found, bits = {}, {}
    for index, block in enumerate(layers):
        reached = until(model, block)
        hessians = pipeline.collect_block_hessians(reached, block, batches, "cpu")
        for name, module in list(linears(block)):
            packed, values = pipeline.quantize_matrix(
                module.weight,
                scales.get(f"{index}.{name}", torch.ones(module.in_features)),
                scheme.bits,
                STATES,
                seed=7919 * index + zlib.crc32(name.encode()) % 1000,
                hessian=hessians.get(name),  # none without data
                equil_alpha=None if batches else 0.0,
            )
            module.weight.data = values.to(module.weight.dtype)
            whole = f"{path}.{index}.{name}.weight"
            found[whole] = module.weight.detach().contiguous()
            rows, columns = module.weight.shape
            bits[whole] = stored_bits(rows, columns, scheme.bits, len(packed["codebook"]))
    return found, bits


class ReachedError(Exception):
    """The rest of the model need not be computed."""


def until(model: Any, block: Any) -> Callable[..., None]:
    """The model as far as a block."""

    def stop(*_: Any) -> None:
        raise ReachedError

    def run(input_ids: Tensor) -> None:
        hook = block.register_forward_hook(stop)
        try:
            model.model(input_ids)
        except ReachedError:
            pass
        finally:
            hook.remove()

    return run


def linears(block: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of a decoder block."""
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name, module


def stored_bits(rows: int, columns: int, bits: int, codebook: int) -> int:
    """Codes; float16 row scales, column folds and codebook; a sign of the rotation per column."""
    return rows * columns * bits + FLOAT16 * (rows + columns + codebook) + columns


def search(
    targets: Tensor, codebook: Tensor, trellis: Any, start_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """turbopress' `_viterbi` with the same result in less time on a CPU.

    targets:     float32 [rows, columns];  codebook: float32 [levels], of which every fourth level
                 belongs to a subset.
    trellis:     turbopress' own;  start_state: int64 [rows], 0 if not given.
    returns:     levels, path bits and members of the subsets, uint8 [rows, columns], and the
                 states at the end, int64 [rows].
    """
    rows, columns = targets.shape
    members = torch.zeros(rows, columns, 4, dtype=torch.uint8)
    costs = torch.empty(rows, columns, 4)
    for subset in range(4):
        levels = codebook[subset::4]
        thresholds = (levels[:-1] + levels[1:]) / 2
        member = torch.bucketize(targets.contiguous(), thresholds)
        members[:, :, subset] = member
        costs[:, :, subset] = (targets - levels[member]).pow(2)
    start = torch.zeros(rows) if start_state is None else start_state
    tables = [getattr(trellis, name).numpy() for name in ("prev0", "prev1", "sub0", "sub1")]
    path, subsets, ends = cheapest_paths(costs.numpy(), start.long().numpy(), *tables)
    taken = torch.from_numpy(subsets)
    chosen = members.gather(2, taken.long()[:, :, None])[:, :, 0]
    return chosen * 4 + taken, torch.from_numpy(path), chosen, torch.from_numpy(ends)


def cheapest_paths(
    costs: Any, start: Any, previous0: Any, previous1: Any, subset0: Any, subset1: Any
) -> tuple[Any, Any, Any]:
    """Viterbi search over rows of branch costs.

    costs: float32 [rows, columns, 4 subsets];  start: the state that each row begins in.
    previous0, previous1, subset0, subset1: of each state, where its two branches come from and
    which subset they take.
    returns: the lowest bit of the states and the subsets, uint8 [rows, columns], and end states.
    """
    rows, columns, _ = costs.shape
    path = np.empty((rows, columns), np.uint8)
    subsets = np.empty((rows, columns), np.uint8)
    ends = np.empty(rows, np.int64)
    _search()(costs, start, previous0, previous1, subset0, subset1, path, subsets, ends)
    return path, subsets, ends


@functools.cache
def _search() -> Callable[..., None]:
    import numba

    found: Callable[..., None] = numba.njit(_fill)
    return found


def _fill(
    costs: Any,
    start: Any,
    previous0: Any,
    previous1: Any,
    subset0: Any,
    subset1: Any,
    path: Any,
    subsets: Any,
    ends: Any,
) -> None:
    """As above, into the last three arrays; of equal paths the first, as turbopress has it.

    LANES rows are searched at once, which a compiler turns into vector instructions.
    """
    rows, columns, _ = costs.shape
    states = len(previous0)
    second = np.empty((columns, states, LANES), np.uint8)
    cost = np.zeros((4, LANES), np.float32)
    best = np.empty((2, states, LANES), np.float32)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        best[0] = np.inf
        for lane in range(count):
            best[0, start[first + lane], lane] = 0
        for column in range(columns):
            for lane in range(count):
                for subset in range(4):
                    cost[subset, lane] = costs[first + lane, column, subset]
            old, new = best[column % 2], best[1 - column % 2]
            for state in range(states):
                from0, from1 = old[previous0[state]], old[previous1[state]]
                cost0, cost1 = cost[subset0[state]], cost[subset1[state]]
                to, mark = new[state], second[column, state]
                for lane in range(LANES):
                    one, other = from0[lane] + cost0[lane], from1[lane] + cost1[lane]
                    mark[lane] = other < one
                    to[lane] = other if other < one else one
        for lane in range(count):
            row = first + lane
            state = int(np.argmin(best[columns % 2, :, lane]))
            ends[row] = state
            for column in range(columns - 1, -1, -1):
                path[row, column] = state & 1
                if second[column, state, lane]:
                    subsets[row, column] = subset1[state]
                    state = previous1[state]
                else:
                    subsets[row, column] = subset0[state]
                    state = previous0[state]
