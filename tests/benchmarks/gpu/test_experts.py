"""What `acceptance.py` times of experts and embeddings, as far as it goes without a GPU."""

import experts
import torch
from cost_model import LAYOUTS
from experts import Shape

from precalib_kernels import ops

SHAPE = Shape(experts=4, chosen=2, outputs=70, inputs=288)


def test_packed_experts_are_what_the_operator_takes():
    packed = experts.packed_experts("balanced-3", SHAPE, device="cpu")
    named = ops.named_arrays(packed, 288, [70], LAYOUTS["balanced-3"], (4,))
    assert all(array.shape[0] == 4 for array in named.values())
    assert named["qweight"].stride(0)  # memory of its own for each


def test_a_token_chooses_no_expert_twice():
    grouping = experts.routed(SHAPE, 6, device="cpu")
    routes, places = grouping.routes, int(grouping.routes.used)
    chosen = [set() for _ in range(6)]
    for place, route in enumerate(routes.sorted[:places].tolist()):
        if route < 12:
            chosen[route // 2].add(int(routes.expert_ids[place // routes.block]))
    assert [len(some) for some in chosen] == [2] * 6
    assert grouping.factors.shape == (12,)


def test_torchs_grouped_product_has_as_many_rows():
    x, weight = torch.randn(6, 32), torch.randn(4, 8, 32)
    call = experts.plain_grouped(x, weight, 2)
    rows, columns = call.args
    assert rows.shape == (12, 32)
    assert columns.shape == (4, 32, 8)
    assert call.keywords["offs"].tolist() == [3, 6, 9, 12]


def test_the_table_leaves_out_what_did_not_run():
    rows = [
        {"case": "a", "rows": 1, "microseconds": {"bf16": 2.0, "balanced-4": 1.25}},
        {"case": "b", "rows": 16, "microseconds": {"balanced-4": 3.0}},
    ]
    assert list(experts.markdown(rows)) == [
        "| experts or embeddings | tokens | bf16, µs | balanced-4, µs |",
        "|--|--:|--:|--:|",
        "| a | 1 | 2.0 | 1.2 |",
        "| b | 16 |  | 3.0 |",
    ]
