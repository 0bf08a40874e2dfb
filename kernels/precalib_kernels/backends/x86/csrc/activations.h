// Activations in float32: x times the column scale, permuted to the column order of `decode.h`.
#pragma once

#include "decode.h"

namespace precalib {
namespace {

template <Type kType>
inline F32x8 load8(const void* from, int64_t at) {
  if constexpr (kType == kFloat32) return load<F32x8>((const float*)from + at);
  const __m128i halves = load<__m128i>((const uint16_t*)from + at);
  if constexpr (kType == kFloat16) return (F32x8)_mm256_cvtph_ps(halves);
  return (F32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

template <Type kType>
inline void permute_typed(const X86Layout& layout, const void* x, int64_t row,
                          const uint16_t* column_scale, int64_t first, float* out) {
  const int64_t quarter = min(layout.group_size, layout.columns - first) / 4;
  for (int64_t t = 0; t < quarter; t += 8) {
    F32x8 v[4];
    for (int s = 0; s < 4; ++s) {
      const int64_t column = first + s * quarter + t;
      v[s] = load8<kType>(x, row * layout.columns + column);
      if (column_scale) v[s] *= load8<kFloat16>(column_scale, column);
    }
    typedef int32_t Order __attribute__((vector_size(32)));
    const Order low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
    const Order front = {0, 1, 8, 9, 2, 3, 10, 11}, back = {4, 5, 12, 13, 6, 7, 14, 15};
    const F32x8 a = __builtin_shuffle(v[0], v[1], low), b = __builtin_shuffle(v[2], v[3], low);
    const F32x8 c = __builtin_shuffle(v[0], v[1], high), d = __builtin_shuffle(v[2], v[3], high);
    float* const to = out + 4 * t;
    store(to, __builtin_shuffle(a, b, front));
    store(to + 8, __builtin_shuffle(a, b, back));
    store(to + 16, __builtin_shuffle(c, d, front));
    store(to + 24, __builtin_shuffle(c, d, back));
  }
}

// Permutes one group of one row of x, from column `first` on: its column s * L/4 + t, where L is
// the group's length, goes to 4 * t + s.
inline void permute_group(const X86Layout& layout, const void* x, int64_t row, int64_t type,
                          const uint16_t* column_scale, int64_t first, float* out) {
  switch (type) {
    case kFloat32: return permute_typed<kFloat32>(layout, x, row, column_scale, first, out);
    case kFloat16: return permute_typed<kFloat16>(layout, x, row, column_scale, first, out);
    default: return permute_typed<kBfloat16>(layout, x, row, column_scale, first, out);
  }
}

// Permutes a whole row of x, group by group. out: [columns].
inline void permute_row(const X86Layout& layout, const void* x, int64_t row, int64_t type,
                        const uint16_t* column_scale, float* out) {
  for (int64_t first = 0; first < layout.columns; first += layout.group_size)
    permute_group(layout, x, row, type, column_scale, first, out + first);
}

}  // namespace
}  // namespace precalib
