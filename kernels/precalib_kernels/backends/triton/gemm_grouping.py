"""Blocks of x that belong to experts: which expert, and where its weight lies."""

import triton
import triton.language as tl


@triton.jit
def block_expert(expert_ids, used, block, BLOCK_M: tl.constexpr):
    """Number of the expert that a block of x belongs to; negative if none of its places is used."""
    return tl.load(expert_ids + block, mask=block * BLOCK_M < tl.load(used), other=-1)


@triton.jit
def of_expert(pointer, expert, size):
    """Pointer to an expert's part of an array of `size` elements each; 32 bits would not do."""
    return pointer + expert.to(tl.int64) * size
