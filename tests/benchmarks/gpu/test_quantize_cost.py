"""What quantizing costs on a GPU, counted without one."""

import pytest
import quantize_cost
import torch
from quantize_cost import Counting, count_encoding, feedback_cost, search_cost

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("target", "weighted", "most"), [("sm_80", 0, 95), ("sm_90", 1, 102)])
def test_the_trellis_search_rounds_as_a_cpu_does(target, weighted, most):
    """No multiply-add is fused; thread-instructions per weight."""
    cost = search_cost(bool(weighted), target)
    assert "FMUL" in cost.compiled.code
    assert "FFMA" not in cost.compiled.code
    assert cost.compiled.spilled == 0
    assert cost.instructions <= most


def test_error_feedback_rounds_as_a_cpu_does():
    """As reached, with a tenth of room."""
    cost = feedback_cost("sm_90")
    for compiled in cost.compiled:
        assert "FMUL" in compiled.code
        assert "FFMA" not in compiled.code
    assert cost.search < 5500
    assert cost.push < 8


def test_operators_counted_by_hand():
    x, out = torch.ones(4, 8), torch.zeros(8)
    with Counting() as counting:
        (x.T + x.T).view(torch.int32)  # reads twice and writes 128 bytes; views are free
        out.add_(x[0].expand(3, 8)[0])
    assert dict(counting.counts.kernels) == {"aten.add": 1, "aten.add_": 1}
    assert dict(counting.counts.bytes) == {"aten.add": 384, "aten.add_": 96}


def test_a_weight_is_encoded_in_few_kernels_and_bytes():
    """Per weight, as reached, with a tenth of room; the search in torch starts thousands more."""
    rows, columns = 256, 512
    counts = count_encoding("balanced-4", rows, columns, in_torch=False)
    slow = count_encoding("balanced-4", rows, columns, in_torch=True)
    assert counts.bytes.total() / rows / columns < 460
    assert slow.kernels.total() > counts.kernels.total() + 2000


def test_the_report_names_every_chip(capsys):
    quantize_cost.report("balanced-3", 64, 256, in_torch=True)
    out = capsys.readouterr().out
    assert "balanced-3, one weight of 64 x 256" in out
    assert all(name in out for name in ("A100", "H100", "B200"))
