"""turbopress as a peer: sizes, windows, and that the compiled search finds the best path."""

import itertools
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

Load = Callable[[str], ModuleType]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 33])
def test_search_finds_the_cheapest_of_all_paths(load: Load, rows: int) -> None:
    """Four states, of which state s goes to (2 s + bit) mod 4, against every path."""
    peers = load("turbopress_peers")
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(rows, 7, 4, generator=generator).numpy()
    start = torch.randint(4, (rows,), generator=generator).numpy()
    subset_of = [[0, 2], [1, 3], [2, 0], [3, 1]]  # of a state's branch with bit 0, 1
    previous = [[state >> 1, (state >> 1) + 2] for state in range(4)]
    tables = [
        *(np.array([previous[state][which] for state in range(4)]) for which in (0, 1)),
        *(np.array([subset_of[previous[s][which]][s & 1] for s in range(4)]) for which in (0, 1)),
    ]
    path, subsets, ends = peers.cheapest_paths(costs, start, *tables)
    for row in range(rows):
        found = []
        for bits in itertools.product((0, 1), repeat=7):
            state, total, taken = int(start[row]), 0.0, []
            for column, bit in enumerate(bits):
                taken.append(subset_of[state][bit])
                total += float(costs[row, column, taken[-1]])
                state = (2 * state + bit) % 4
            found.append((total, bits, taken, state))
        _, bits, taken, state = min(found)
        assert path[row].tolist() == list(bits)
        assert subsets[row].tolist() == taken
        assert ends[row] == state


def test_stored_bits(load: Load) -> None:
    """Codes of 3 bits; 16 bits for 10 rows, 20 columns, 16 levels; a sign for 20 columns."""
    assert load("turbopress_peers").stored_bits(10, 20, 3, 16) == 600 + 16 * 46 + 20


def test_points_are_told_apart(load: Load) -> None:
    schemes = load("turbopress_peers").SCHEMES
    assert len({(scheme.method, scheme.variant) for scheme in schemes}) == len(schemes)
    for scheme in schemes:
        assert (scheme.method == "turbopress, no data") == (scheme.windows == 0)


def test_the_model_is_computed_as_far_as_the_block(load: Load) -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    seen: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    holder = torch.nn.Module()
    holder.model = torch.nn.Sequential(*layers)
    load("turbopress_peers").until(holder, layers[1])(torch.ones(1, 2))
    assert seen == [0, 1]
    holder.model(torch.ones(1, 2))
    assert seen == [0, 1, 0, 1, 2]  # the stop is gone
