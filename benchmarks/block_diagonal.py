"""CafeQ's transform of single weights (arXiv 2511.19705), which costs a product while serving.

    python benchmarks/block_diagonal.py accuracy SOURCE --text FILE
    python benchmarks/block_diagonal.py time [--sizes 576 4096] [--rows 1 16 256]

W [N, K] is quantized as W·M⁻¹ with M block-diagonal, K / b blocks of b x b, and inputs are
multiplied by M: K·b multiply-adds per row of x beside N·K. No recipe does this. `accuracy` prints
the KL without, with random rotations, and with M learned on two proxies: LogSumExp of the largest
weights of groups (CafeQ's), and the expected error under the recipe. `time` prints the time of the
product with M beside that of the packed one.
"""

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from quality import decoder_weights
from torch import Tensor

from offline_quantize.checkpoint.source import open_checkpoint
from offline_quantize.evaluation.kl import compare, reference_distributions, text_windows
from offline_quantize.evaluation.models import load_original, load_tokenizer
from offline_quantize.method.encode import encode_unchecked
from offline_quantize.method.pair_rounding import unpacked
from offline_quantize.method.recipes import RECIPES, Recipe
from offline_quantize.method.value_output_learning import cayley
from offline_quantize.method.value_output_proxies import ExpectedErrors
from offline_quantize.method.weight_statistics import relative_error

BLOCK, GROUP, TEMPERATURE = 32, 128, 5.0
TRANSFORMS = (
    "none",
    "random rotation",
    "LogSumExp, orthogonal",
    "LogSumExp, invertible",
    "expected error, orthogonal",
    "expected error, invertible",
)


def blocks(weight: Tensor, size: int) -> Tensor:
    """W [N, K] as [K / b, N, b]."""
    return weight.reshape(len(weight), -1, size).transpose(0, 1)


def joined(parts: Tensor) -> Tensor:
    """Inverse of `blocks`."""
    return parts.transpose(0, 1).flatten(1)


def log_sum_exp(weight: Tensor, unit: float) -> Tensor:
    """CafeQ's proxy: smooth maximum of the largest magnitudes of all groups."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP))
    largest = padded.reshape(len(weight), -1, GROUP).abs().amax(-1).flatten() / unit
    return (TEMPERATURE * largest).logsumexp(0) / TEMPERATURE


def expected_error(weight: Tensor, transform: Tensor, recipe: Recipe) -> Tensor:
    """log E‖(Ŵ' − W')·M‖² of W' = W·M⁻¹, errors of single weights being independent."""
    reach = transform.square().sum(2).flatten()
    return (ExpectedErrors.of(weight, recipe).of_columns() @ reach).log()


def learn(
    weight: Tensor, size: int, recipe: Recipe | None, skew: bool, steps: int, rate: float = 1e-2
) -> Tensor:
    """M [K / b, b, b] that makes a proxy of W·M⁻¹ small, by Adam from the identity.

    recipe: of the expected error; None for LogSumExp.
    """
    parts = blocks(weight, size)
    unit = float(weight.square().mean().sqrt())
    free = torch.zeros(len(parts), size, size, requires_grad=True)
    adam = torch.optim.Adam([free], lr=rate)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = (free - free.mT) / 2 if skew else free
        changed = joined(parts @ cayley(-chosen))
        if recipe is None:
            loss = log_sum_exp(changed, unit)
        else:
            loss = expected_error(changed, cayley(chosen), recipe)
        adam.zero_grad()
        loss.backward()
        adam.step()
    final = free.detach()
    return cayley((final - final.mT) / 2 if skew else final)


def matrices(weight: Tensor, transform: str, recipe: str, size: int, steps: int) -> Tensor | None:
    """M of a weight, None for none."""
    if transform == "none":
        return None
    if transform == "random rotation":
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(weight.shape[1] // size, size, size, generator=generator)
        rotation: Tensor = torch.linalg.qr(noise).Q
        return rotation
    measured = RECIPES[recipe] if transform.startswith("expected error") else None
    return learn(weight, size, measured, transform.endswith("orthogonal"), steps)


def accuracy(arguments: argparse.Namespace) -> None:
    """KL of the whole model for each recipe and transform, one JSON line each."""
    weights = decoder_weights(open_checkpoint(arguments.source))
    model: Any = load_original(arguments.source, torch.bfloat16, "cpu")
    parameters = dict(model.named_parameters())
    windows = text_windows(load_tokenizer(arguments.source), [arguments.text], arguments.tokens)
    reference = reference_distributions(model, windows)
    size, steps = arguments.block, arguments.steps
    for recipe in arguments.recipes:
        for transform in arguments.transforms:
            errors, seconds = [], 0.0
            for name, weight in weights.items():
                start = time.process_time()
                found = matrices(weight.float(), transform, recipe, size, steps)
                seconds += time.process_time() - start
                effective = rounded(weight.float(), found, recipe, size)
                errors.append(relative_error(weight.float(), effective))
                parameters[name].data.copy_(effective)
            kl = float(compare(reference, model, windows).kl.double().mean())
            row = {
                "source": arguments.source.name,
                "recipe": recipe,
                "transform": transform,
                "block": size,
                "steps": steps,
                "tokens": arguments.tokens,
                "kl": kl,
                "relative_error": statistics.mean(errors),
                "learning_seconds": seconds,
            }
            print(json.dumps(row), flush=True)


def rounded(weight: Tensor, transform: Tensor | None, recipe: str, size: int) -> Tensor:
    """The weight that x meets: what W·M⁻¹ is quantized to, times M."""
    if transform is not None:
        weight = joined(blocks(weight, size) @ torch.linalg.inv(transform))
    found = unpacked(encode_unchecked(weight, RECIPES[recipe], "weight"), weight)
    return found if transform is None else joined(blocks(found, size) @ transform)


def timing(arguments: argparse.Namespace) -> None:
    """Times of one product with M, of the packed product, and their ratio."""
    from cpu_linear import finite_values

    from precalib_kernels.backends.x86 import op
    from precalib_kernels.backends.x86.memory_layout import X86Layout

    print("| K = N | x rows | multiply-adds of M | packed, µs | with M, µs | share |")
    print("|--:|--:|--:|--:|--:|--:|")
    for size in arguments.sizes:
        plan = X86Layout(RECIPES[arguments.recipe].layout, size, (size,))
        packed = torch.randint(0, 64, (plan.nbytes,), dtype=torch.uint8)
        finite_values(packed, plan)
        layout = op.layout_tensor(plan)
        block = torch.randn(size // arguments.block, arguments.block, arguments.block).bfloat16()
        for rows in arguments.rows:
            x = torch.randn(rows, size).bfloat16()
            product = functools.partial(op.linear, x, packed, layout, None, size, isa=-1)
            online = functools.partial(multiplied, x, block)
            one, other = interleaved(product, online, arguments.rounds)
            print(
                f"| {size} | {rows} | {arguments.block / size:.1%} | {1e6 * one:.0f} "
                f"| {1e6 * other:.0f} | {other / one:.0%} |",
                flush=True,
            )


def multiplied(x: Tensor, transform: Tensor) -> Tensor:
    """M·x of every row [M, K]."""
    return joined(torch.bmm(blocks(x, transform.shape[1]), transform.mT))


def interleaved(
    one: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int
) -> tuple[float, float]:
    """Least seconds of each over rounds that take turns: a busy machine only adds to a time."""
    seconds: Mapping[Callable[[], Tensor], list[float]] = {one: [], other: []}
    for _ in range(rounds):
        for operator, found in seconds.items():
            operator()
            start = time.perf_counter()
            operator()
            found.append(time.perf_counter() - start)
    return min(seconds[one]), min(seconds[other])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measured = commands.add_parser("accuracy")
    measured.add_argument("source", type=Path, help="folder of an unquantized checkpoint")
    measured.add_argument("--text", type=Path, required=True)
    measured.add_argument("--tokens", type=int, default=4096)
    measured.add_argument("--steps", type=int, default=100)
    measured.add_argument("--recipes", nargs="+", default=["balanced-3", "rtn-3"])
    measured.add_argument("--transforms", nargs="+", default=TRANSFORMS, choices=TRANSFORMS)
    measured.set_defaults(run=accuracy)
    timed = commands.add_parser("time")
    timed.add_argument("--sizes", type=int, nargs="+", default=[576, 1536, 4096])
    timed.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    timed.add_argument("--recipe", default="balanced-4")
    timed.add_argument("--rounds", type=int, default=200)
    timed.set_defaults(run=timing)
    for command in (measured, timed):
        command.add_argument("--block", type=int, default=BLOCK)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    arguments.run(arguments)


if __name__ == "__main__":
    main()
