// Finds the blocks, groups and salient weights of a packed weight.
#pragma once

#include "decode.h"

namespace precalib {
namespace {

// A block of 16 output rows: where it is packed, and which rows it holds.
struct Block {
  const uint8_t* planes;
  const uint8_t* metadata;
  const float* row_values;         // [3][16]: factor of the scales; salient step and offset
  int64_t shard, first_row, rows;  // rows: at most 16
};

inline int64_t count_blocks(const PackedLayout& layout, int64_t shard) {
  return (layout.shard_rows[shard] + kLanes - 1) / kLanes;
}

inline Block find_block(const PackedLayout& layout, const uint8_t* packed, int64_t index) {
  int64_t row = 0, shard = 0, local = index;
  for (int64_t blocks; local >= (blocks = count_blocks(layout, shard)); ++shard) {
    local -= blocks;
    row += layout.shard_rows[shard];
  }
  return {packed + index * layout.block_bytes,
          packed + layout.metadata_offset + index * layout.groups * layout.metadata_bytes,
          (const float*)(packed + layout.row_offset) + index * 3 * kLanes,
          shard,
          row + local * kLanes,
          min(kLanes, layout.shard_rows[shard] - local * kLanes)};
}

// One group of a block: its columns, codes, scales, zero points and salient weights.
struct Group {
  int64_t first, columns, chunks;
  const uint8_t* planes;
  const uint8_t* scales;
  const uint8_t* zeros;
  const uint8_t* salient;  // per slot: positions [16], codes [16], base entries [16]
};

inline Group find_group(const PackedLayout& layout, const Block& block, int64_t index) {
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

// Scales of the group, float32.
inline F32x16 group_scales(const PackedLayout& layout, const Block& block, const Group& group) {
  F32x16 out;
  if (layout.log_scales) {
    const I32x16 codes = load_u8(group.scales);
    const FloatTable factors(layout.factors);
    for (int p = 0; p < kParts; ++p) {
      const I32x4 code = codes.part[p];
      const I32x4 power = factors.lookup(code) - ((code & 0xf0) << 19);  // minus the power of two
      out.part[p] = (F32x4)(power & (I32x4)(code < 255));
    }
  } else {
    for (int p = 0; p < kParts; ++p) out.part[p] = load_fp16(group.scales + p * 2 * kPart);
  }
  for (int p = 0; p < kParts; ++p) out.part[p] *= load<F32x4>(block.row_values + p * kPart);
  return out;
}

// Zero points of the group, float32; zeros with a codebook, which has none.
inline F32x16 group_zeros(const PackedLayout& layout, const Group& group) {
  F32x16 out = {};
  if (!layout.uniform) return out;
  const I32x16 zeros = load_u8(group.zeros);
  for (int p = 0; p < kParts; ++p) out.part[p] = to_f32(zeros.part[p]);
  return out;
}

// What a salient weight of each row differs by from the base weight that it replaces.
struct SalientResidual {
  alignas(16) float delta[kLanes];
  int32_t column[kLanes];  // of permuted x
};

inline void find_residual(const PackedLayout& layout, const Block& block, const Group& group,
                          const F32x16& scale, const F32x16& zero, int64_t slot,
                          SalientResidual& out) {
  const uint8_t* at = group.salient + slot * kLanes * (layout.position_bytes + 2);
  const I32x16 positions = layout.position_bytes == 1 ? load_u8(at) : load_u16(at);
  at += kLanes * layout.position_bytes;
  const I32x16 codes = load_u8(at), entries = load_i8(at + kLanes);
  const int32_t magnitude = int32_t(layout.salient_mask);  // bits of a code that are not its sign
  for (int p = 0; p < kParts; ++p) {
    const I32x4 position = positions.part[p], code = codes.part[p];
    const I32x4 used = (I32x4)(position < int32_t(layout.group_size));
    const float* const row_values = block.row_values + kLanes + p * kPart;
    const I32x4 bits = (I32x4)(to_f32(code & magnitude) * load<F32x4>(row_values) +
                               load<F32x4>(row_values + kLanes));
    const F32x4 value = (F32x4)(bits ^ (code & ~magnitude) << 24);
    const F32x4 base = (to_f32(entries.part[p]) - zero.part[p]) * scale.part[p];
    store(out.delta + p * kPart, (I32x4)(value - base) & used);
    store(out.column + p * kPart, (position & used) + int32_t(group.first));
  }
}

}  // namespace
}  // namespace precalib
