"""The transform of a value–output pair changes no product of the two."""

import pytest
import torch

from offline_quantize.method.value_output import (
    from_output_heads,
    output_heads,
    transform_bias,
    transform_output,
    transform_value,
)

KV_HEADS, QUERIES, SIZE, INPUTS, OUTPUTS = 2, 3, 4, 10, 7


@pytest.fixture
def pair():
    value = torch.randn(KV_HEADS * SIZE, INPUTS)
    output = torch.randn(OUTPUTS, KV_HEADS * QUERIES * SIZE)
    return value, output, torch.randn(KV_HEADS, SIZE, SIZE) + 3 * torch.eye(SIZE)


def products(value, output):
    """W_o·W_v of each query head, one by one."""
    found = []
    for head in range(KV_HEADS * QUERIES):
        read = head // QUERIES  # the KV head that this query head reads
        rows = value[read * SIZE : (read + 1) * SIZE]
        found.append(output[:, head * SIZE : (head + 1) * SIZE].double() @ rows.double())
    return torch.stack(found)


def test_products_of_all_query_heads_stay(pair):
    value, output, matrices = pair
    changed = transform_value(value, matrices), transform_output(output, matrices)
    assert changed[0].dtype == changed[1].dtype == torch.float32
    assert not torch.allclose(changed[0], value)
    expected = products(value, output)
    assert torch.allclose(products(*changed), expected, atol=1e-5 * float(expected.abs().max()))


def test_each_kv_head_has_its_own_matrix(pair):
    value, _, matrices = pair
    changed = transform_value(value, matrices)
    for head in range(KV_HEADS):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        assert torch.allclose(changed[rows], matrices[head] @ value[rows], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_transformed_as_a_column_of_values(pair, dtype):
    value, _, matrices = pair
    bias = value[:, 0].to(dtype)
    changed = transform_bias(bias, matrices)
    assert changed.dtype == dtype
    assert torch.equal(changed, transform_value(bias[:, None].float(), matrices)[:, 0].to(dtype))


def test_the_identity_changes_no_bit(pair):
    value, output, _ = pair
    identity = torch.eye(SIZE).repeat(KV_HEADS, 1, 1)
    assert torch.equal(transform_value(value.bfloat16(), identity), value.bfloat16().float())
    assert torch.equal(transform_output(output, identity), output)


def test_readers_of_a_kv_head_are_put_below_each_other(pair):
    _, output, _ = pair
    parts = output_heads(output, KV_HEADS, SIZE)
    assert parts.shape == (KV_HEADS, OUTPUTS * QUERIES, SIZE)
    second = output[:, QUERIES * SIZE :]  # what reads the second KV head
    assert sorted(parts[1].flatten().tolist()) == sorted(second.flatten().tolist())
    assert torch.equal(from_output_heads(parts, OUTPUTS), output)
