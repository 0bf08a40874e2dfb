#include "gather_rows.h"

#include <vector>

#include "blocks.h"

namespace precalib {
namespace {

constexpr int kSegments = 4, kSteps = 8;  // of a group, and of a chunk in each segment

float to_float(uint32_t bits) { return load<float>(&bits); }
uint32_t to_bits(float value) { return load<uint32_t>(&value); }

// Without the compiler's own types of half precision, which older ones lack.
float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
  if (magnitude >= 0x7c00) return to_float(sign | 0x7f800000 | magnitude << 13);
  return to_float(sign | to_bits(to_float(magnitude << 13) * 0x1p112f));
}

uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // not-a-number
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000)                         // subnormal: rounded by an addition
    return uint16_t(sign | (to_bits(to_float(magnitude) + .5f) - to_bits(.5f)));
  return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - 0x38000000) >> 13);
}

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // stays not-a-number
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One row: its block, and its lane there.
struct Row {
  Block block;
  int64_t lane;
};

Row find_row(const X86Layout& layout, const uint8_t* packed, int64_t number) {
  int64_t block = 0, shard = 0;
  for (; number >= layout.shard_rows[shard]; number -= layout.shard_rows[shard++])
    block += count_blocks(layout, shard);
  return {find_block(layout, packed, block + number / kLanes), number % kLanes};
}

// The bits above the lowest of the code of a step, from the bytes of a row's segment in the planes.
// Arm has an order of its own, `backends/arm/memory_layout.py`.
template <int kBits>
int high_bits(const uint8_t* high, int step) {
#if defined(__aarch64__)
  if constexpr (kBits == 2) return high[0] >> (step ^ 3) & 1;
  if constexpr (kBits == 3) return high[step % 2 * kVector] >> ((step & 6) ^ 2) & 3;
  if constexpr (kBits == 4) {
    const uint8_t *const second = high + kVector, *const third = second + kVector;
    if (step == 6) return (*second >> 1 & 1) | (*third & 3) << 1;
    if (step == 7) return (*high & 3) | (*second & 1) << 2;
    return high[step / 2 * kVector] >> (step % 2 ? 2 : 5) & 7;
  }
  if constexpr (kBits == 5) return high[step / 2 * kVector] >> (step % 2 ? 0 : 4) & 15;
#else
  if constexpr (kBits == 2) return high[0] >> step & 1;
  if constexpr (kBits == 3) return high[step / 4 * kVector] >> 2 * (step % 4) & 3;
  if constexpr (kBits == 4) {
    if (step < 6) return high[step / 2 * kVector] >> 3 * (step % 2) & 7;
    return (high[(step - 6) * kVector] >> 6 & 3) | (high[2 * kVector] >> step & 1) << 2;
  }
  if constexpr (kBits == 5) return high[step / 2 * kVector] >> 4 * (step % 2) & 15;
#endif
}

// Codebook entries of a row's group in nibbles, see `decode_nibbles`, with the zero point taken off.
template <int kBits>
void decode_nibbles(const X86Layout& layout, const Group& group, int64_t lane, float* out) {
  const int zero = layout.uniform ? group.zeros[lane] : 0;
  const int64_t segment_columns = group.columns / kSegments;
  const auto nibble = [&](int64_t k) {
    const int64_t segment = k / segment_columns, step = k % kSteps;
    const uint8_t* const at =
        group.planes + k % segment_columns / kSteps * kBits * kVector + lane * kSegments + segment;
    const auto half = [&](int64_t vector) { return at[vector * kVector] >> step % 2 * 4; };
    if (kBits == 4 || step < 6) return half(step / 2) & 15;
    return (half(0) & 4) >> 2 | (half(1) & 4) >> 1 | (half(2) & 4) << 1;
  };
  const int first = nibble(0);
  int at = first, one = 0, two = 0;  // the low bits of the code before and of the one before that
  for (int64_t k = 0; k < group.columns; ++k) {
    const int next = k + 1 < group.columns ? nibble(k + 1) : first;
    const int low = (layout.trellis ? next : at) >> 3, high = at & ((1 << (kBits - 1)) - 1);
    *out++ = float(layout.codebook[high << 3 | low << 2 | one << 1 | two] - zero);
    at = next;
    two = one;
    one = low;
  }
}

// The same from bit planes.
template <int kBits>
void decode_entries(const X86Layout& layout, const Group& group, int64_t lane, float* out) {
  if (layout.nibbles) return decode_nibbles<kBits>(layout, group, lane, out);
  const int zero = layout.uniform ? group.zeros[lane] : 0;
  const uint8_t* const low_plane = group.planes + lane * kSegments;
  const uint8_t* const high_planes = low_plane + group.chunks * kVector;
  int state = 0;  // the low bits of the two codes before: the nearer one is bit 1
  for (int segment = 0; segment < kSegments; ++segment)
    for (int64_t c = 0; c < group.chunks; ++c) {
      const int low = low_plane[c * kVector + segment];
      const uint8_t* const high = high_planes + c * (kBits - 1) * kVector + segment;
      for (int step = 0; step < kSteps; ++step) {
        state = (low >> step & 1) << 2 | state;
        const int index = high_bits<kBits>(high, step) << 3 | state;
        *out++ = float(layout.codebook[index] - zero);
        state >>= 1;
      }
    }
}

float group_scale(const X86Layout& layout, const Row& row, const Group& group) {
  const float factor = row.block.row_values[row.lane];
  if (!layout.log_scales)
    return factor * half_to_float(load<uint16_t>(group.scales + 2 * row.lane));
  const int code = group.scales[row.lane];
  if (code == 255) return 0;
  // minus the power of two
  return factor * to_float(to_bits(layout.factors[code & 15]) - (uint32_t(code >> 4) << 23));
}

void put_salient(const X86Layout& layout, const Row& row, const Group& group, float* out) {
  const float step = row.block.row_values[kLanes + row.lane];
  const float offset = row.block.row_values[2 * kLanes + row.lane];
  for (int64_t slot = 0; slot < layout.salient_count; ++slot) {
    const uint8_t* const at = group.salient + slot * kLanes * (layout.position_bytes + 2);
    const int64_t position =
        layout.position_bytes == 1 ? at[row.lane] : load<uint16_t>(at + 2 * row.lane);
    if (position >= layout.group_size) continue;  // an unused slot
    const int code = at[kLanes * layout.position_bytes + row.lane];
    const float value = float(code & layout.salient_mask) * step + offset;
    out[position % kSegments * (group.columns / kSegments) + position / kSegments] =
        code & ~int(layout.salient_mask) ? -value : value;
  }
}

template <int kBits>
void decode_row(const X86Layout& layout, const uint8_t* packed, const Row& row, float* out) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, row.block, g);
    const float scale = group_scale(layout, row, group);
    decode_entries<kBits>(layout, group, row.lane, out + group.first);
    for (int64_t k = 0; k < group.columns; ++k) out[group.first + k] *= scale;
    put_salient(layout, row, group, out + group.first);
  }
  if (!layout.column_scale) return;
  const uint8_t* const factors =
      packed + layout.column_offset + row.block.shard * layout.columns * 2;
  for (int64_t k = 0; k < layout.columns; ++k)
    out[k] *= half_to_float(load<uint16_t>(factors + 2 * k));
}

void round_row(const float* values, int64_t count, Type type, void* y, int64_t at) {
  if (type == kFloat32) {
    std::memcpy((float*)y + at, values, size_t(count) * sizeof(float));
  } else if (type == kBfloat16) {
    uint16_t* const out = (uint16_t*)y + at;
    for (int64_t k = 0; k < count; ++k) out[k] = float_to_bfloat16(values[k]);
  } else {
    uint16_t* const out = (uint16_t*)y + at;
    for (int64_t k = 0; k < count; ++k) out[k] = float_to_half(values[k]);
  }
}

}  // namespace

void gather_rows(const X86Layout& layout, const uint8_t* packed, const int64_t* ids, int64_t count,
                 Type type, void* y) {
  const auto decode = layout.bits == 2   ? decode_row<2>
                      : layout.bits == 3 ? decode_row<3>
                      : layout.bits == 4 ? decode_row<4>
                                         : decode_row<5>;
#pragma omp parallel if (count > 1)
  {
    std::vector<float> values(size_t(layout.columns));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      decode(layout, packed, find_row(layout, packed, ids[i]), values.data());
      round_row(values.data(), layout.columns, type, y, i * layout.columns);
    }
  }
}

}  // namespace precalib
