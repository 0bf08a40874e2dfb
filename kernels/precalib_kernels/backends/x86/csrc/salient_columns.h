// Salient residuals on ISAs without VBMI: what salient weights differ by from the base weights that
// they replace, times x in float32.
#pragma once

#include "decode.h"
#include "shuffle_vectors.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// One salient weight of each row of a block.
struct SalientColumn {
  alignas(64) float delta[kLanes];       // salient minus base weight
  alignas(64) int32_t x_offset[kLanes];  // of its column in the transposed x
};

// Decodes the salient weights of groups [first, last). A pass of its own, since reading back at
// once what was just stored stalls.
inline void find_salient_columns(const X86Layout& layout, const Block& block, int64_t first,
                                 int64_t last, SalientColumn* out) {
  for (int64_t g = first; g < last; ++g) {
    const Group group = find_group(layout, block, g);
    for (int row = 0; row < kLanes; row += kPartRows) {
      const Floats scale = group_scales<NativeLanes>(layout, block, group, row);
      const Floats zero = group_zeros<NativeLanes>(layout, group, row);
      for (int64_t j = 0; j < layout.salient_count; ++j) {
        const auto salient = find_salient<NativeLanes>(layout, block, group, j, row);
        const Floats base = (salient.base_entry - zero) * scale;
        store(out[j].delta + row, (Ints)(salient.value - base) & salient.used);
        store(out[j].x_offset + row,
              ((salient.position & salient.used) + int32_t(group.first)) * kPartRows);
      }
    }
    out += layout.salient_count;
  }
}

// totals[row of x][16] += residuals times x. columns: x transposed, [column][kPartRows rows].
inline void add_salient_columns(const SalientColumn* salient, int64_t count, const float* columns,
                                int64_t rows, float* totals) {
  constexpr int kAtOnce = 8;
  for (int first = 0; first < kLanes; first += kAtOnce) {
    Floats sum[kAtOnce] = {};
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
      for (int l = 0; l < kAtOnce; ++l)
        sum[l] +=
            load<Floats>(columns + salient[i].x_offset[first + l]) * salient[i].delta[first + l];
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int l = 0; l < kAtOnce; ++l) totals[r * kLanes + first + l] += sum[l][r];
  }
}

}  // namespace
}  // namespace precalib

#endif
