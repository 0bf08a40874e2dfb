// What Python tells the kernels: the shape of a packed weight and where its parts lie.
// `memory_layout.py` mirrors Plan field by field, and describes the packed form.
#pragma once

#include <cstdint>

namespace precalib {

constexpr int kLanes = 16;        // output rows of a block, one per 32-bit lane
constexpr int kChunk = 32;        // columns of a chunk: 4 segments times 8 steps
constexpr int kVector = 64;       // bytes of a bit plane of a chunk

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Plan {
  int64_t columns, group_size, groups;
  int64_t part_count;
  const int64_t* part_rows;
  int64_t bits, salient_count, position_bytes, salient_mask;
  int64_t log_scales, uniform, column_scale, int8_inputs;
  int64_t block_bytes;  // bit planes of a block
  int64_t side_bytes;   // scales, zeros and salient weights of a group of a block
  int64_t side_offset, row_offset, column_offset, packed_bytes;
  int8_t levels[128];   // by index: high bits of the code, then u[k], u[k-1], u[k-2]
  float factors[16];    // 2**(-i / 16), of scale codes; code 255 is scale zero
};

struct Call {
  const Plan* plan;
  const uint8_t* packed;
  const void* x;
  const void* bias;
  void* y;
  int64_t rows, type;
};

// One copy of the kernels per level of instructions.
using Run = void(const Call&);
namespace avx2 { Run run; }
namespace avx512 { Run run; }
namespace avx512_vnni { Run run; }
namespace avx512_bf16 { Run run; }
namespace amx { Run run; }

}  // namespace precalib

// In isa_dispatch.cpp.
extern "C" int precalib_level();
extern "C" void precalib_linear(const precalib::Plan* plan, int64_t level, const void* packed,
                                const void* x, const void* bias, void* y, int64_t rows, int64_t type);
