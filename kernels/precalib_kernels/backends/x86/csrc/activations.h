// Inputs times their column scale, in the order in which `decode.h` meets the columns.
#pragma once

#include "decode.h"

namespace precalib {
namespace {

template <Type kType>
inline Floats8 load8(const void* from, int64_t at) {
  if constexpr (kType == kFloat32) return load<Floats8>((const float*)from + at);
  const __m128i halves = load<__m128i>((const uint16_t*)from + at);
  if constexpr (kType == kFloat16) return (Floats8)_mm256_cvtph_ps(halves);
  return (Floats8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

template <Type kType>
inline void arrange_typed(const Plan& plan, const void* x, int64_t row,
                          const uint16_t* column_scale, int64_t first, float* out) {
  const int64_t quarter = smaller(plan.group_size, plan.columns - first) / 4;
  for (int64_t t = 0; t < quarter; t += 8) {
    Floats8 v[4];
    for (int s = 0; s < 4; ++s) {
      const int64_t column = first + s * quarter + t;
      v[s] = load8<kType>(x, row * plan.columns + column);
      if (column_scale) v[s] *= load8<kFloat16>(column_scale, column);
    }
    typedef int32_t Order __attribute__((vector_size(32)));
    const Order low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
    const Order front = {0, 1, 8, 9, 2, 3, 10, 11}, back = {4, 5, 12, 13, 6, 7, 14, 15};
    const Floats8 a = __builtin_shuffle(v[0], v[1], low), b = __builtin_shuffle(v[2], v[3], low);
    const Floats8 c = __builtin_shuffle(v[0], v[1], high), d = __builtin_shuffle(v[2], v[3], high);
    float* const to = out + 4 * t;
    store(to, __builtin_shuffle(a, b, front));
    store(to + 8, __builtin_shuffle(a, b, back));
    store(to + 16, __builtin_shuffle(c, d, front));
    store(to + 24, __builtin_shuffle(c, d, back));
  }
}

// A group of one row of x, from column `first` on: column s * L/4 + t of it goes to 4 * t + s.
inline void arrange_group(const Plan& plan, const void* x, int64_t row, int64_t type,
                          const uint16_t* column_scale, int64_t first, float* out) {
  switch (type) {
    case kFloat32: return arrange_typed<kFloat32>(plan, x, row, column_scale, first, out);
    case kFloat16: return arrange_typed<kFloat16>(plan, x, row, column_scale, first, out);
    default: return arrange_typed<kBfloat16>(plan, x, row, column_scale, first, out);
  }
}

// The same for a whole row, [columns] to [columns].
inline void arrange_row(const Plan& plan, const void* x, int64_t row, int64_t type,
                        const uint16_t* column_scale, float* out) {
  for (int64_t first = 0; first < plan.columns; first += plan.group_size)
    arrange_group(plan, x, row, type, column_scale, first, out + first);
}

}  // namespace
}  // namespace precalib
