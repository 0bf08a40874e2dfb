// The memory layout of a packed weight, as Python hands it over. `memory_layout.py` mirrors
// X86Layout field by field and describes the layout.
#pragma once

#include <cstdint>

namespace precalib {

constexpr int kLanes = 16;   // output rows of a block, one per 32-bit lane
constexpr int kChunk = 32;   // columns of a chunk: 4 segments times 8 steps
constexpr int kVector = 64;  // bytes of a bit plane of a chunk

struct X86Layout {
  int64_t columns, group_size, groups;
  int64_t shard_count;
  const int64_t* shard_rows;
  int64_t bits, salient_count, position_bytes, salient_mask;
  int64_t log_scales, uniform, column_scale, int8_inputs;
  int64_t block_bytes;     // codes of one block
  int64_t metadata_bytes;  // scales, zeros and salient weights of a group of a block
  int64_t metadata_offset, row_offset, column_offset, packed_bytes;
  int8_t codebook[128];  // by index: high bits of the code, then u[k], u[k-1], u[k-2]
  float factors[16];     // 2**(-i / 16), of scale codes; code 255 means a scale of zero
  int64_t trellis;
  int64_t nibbles;  // codes of 3 and 4 bits are nibbles, for ISAs without VBMI
};

}  // namespace precalib
