// Where the blocks and groups of a packed weight are, on every processor: no vectors here.
#pragma once

#include "memory.h"
#include "memory_layout.h"

namespace precalib {
namespace {

// A block of 16 output rows: where it is packed, and which rows it holds.
struct Block {
  const uint8_t* planes;
  const uint8_t* metadata;
  const float* row_values;         // [3][16]: factor of the scales; salient step and offset
  int64_t shard, first_row, rows;  // rows: at most 16
};

inline int64_t count_blocks(const X86Layout& layout, int64_t shard) {
  return (layout.shard_rows[shard] + kLanes - 1) / kLanes;
}

inline int64_t count_blocks(const X86Layout& layout) {
  int64_t blocks = 0;
  for (int64_t p = 0; p < layout.shard_count; ++p) blocks += count_blocks(layout, p);
  return blocks;
}

inline Block find_block(const X86Layout& layout, const uint8_t* packed, int64_t index) {
  Block block;
  block.planes = packed + index * layout.block_bytes;
  block.metadata = packed + layout.metadata_offset + index * layout.groups * layout.metadata_bytes;
  block.row_values = (const float*)(packed + layout.row_offset) + index * 3 * kLanes;
  int64_t row = 0, shard = 0, local = index;
  for (;; ++shard) {
    const int64_t blocks = count_blocks(layout, shard);
    if (local < blocks) break;
    local -= blocks;
    row += layout.shard_rows[shard];
  }
  block.shard = shard;
  block.first_row = row + local * kLanes;
  block.rows = min(kLanes, layout.shard_rows[shard] - local * kLanes);
  return block;
}

// One group of a block: its columns, codes, scales, zero points and salient weights.
struct Group {
  int64_t first, columns, chunks;
  const uint8_t* planes;
  const uint8_t* scales;
  const uint8_t* zeros;
  const uint8_t* salient;  // per slot: positions [16], codes [16], base entries [16]
};

inline Group find_group(const X86Layout& layout, const Block& block, int64_t index) {
  Group group;
  group.first = index * layout.group_size;
  group.columns = min(layout.group_size, layout.columns - group.first);
  group.chunks = group.columns / kChunk;
  group.planes = block.planes + group.first / kChunk * layout.bits * kVector;
  group.scales = block.metadata + index * layout.metadata_bytes;
  group.zeros = group.scales + kLanes * (layout.log_scales ? 1 : 2);
  group.salient = group.zeros + (layout.uniform ? kLanes : 0);
  return group;
}

}  // namespace
}  // namespace precalib
