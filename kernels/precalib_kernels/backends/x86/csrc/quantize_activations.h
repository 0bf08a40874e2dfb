// Inputs in fixed point: kDigits signed base-256 digits in units of their group's largest magnitude,
// which is finer than the same values in bfloat16 (two digits) or about float32 (three). One digit is
// coarser, and only for who asks for it.
#pragma once

#include "activations.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

// A group of one row of x in fixed point.
template <int kDigits>
struct Fixed {
  float unit;             // value of the last digit's one
  float total;            // sum of the digits' values, in units
  int32_t start[kDigits];  // -128 times the sum of each digit
};

// count: inputs of a group. Sixteen digits d from input k on go to at(d, k), highest digits first.
template <int kDigits, class At>
inline Fixed<kDigits> to_fixed(const float* x, int64_t count, At&& at) {
  // All digits at 127, less what rounding may add.
  constexpr float kLargest = kDigits == 1   ? 127
                             : kDigits == 2 ? 127 * 257 - 1
                                            : 127 * 65793 - 2;
  Ints peaks = {};  // magnitudes of floats are in the order of their bits, not-a-number last
  for (int64_t k = 0; k < count; k += kLanes) {
    const Ints magnitude = (Ints)load<Floats>(x + k) & 0x7fffffff;
    peaks = magnitude > peaks ? magnitude : peaks;
  }
  const float peak = _mm512_reduce_max_ps((__m512)peaks);
  const bool finite = _mm512_reduce_max_epi32((__m512i)peaks) < 0x7f800000;
  // a row of tiny numbers: 1 / unit would overflow
  const float inverse = finite && peak > 0x1p-100f ? kLargest / peak : 0;
  Ints sums[kDigits] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    Ints rest = (Ints)_mm512_cvtps_epi32((__m512)(load<Floats>(x + k) * inverse));
    for (int d = kDigits - 1; d >= 0; --d) {
      const Ints digit = d ? rest << 24 >> 24 : rest;
      rest = (rest - digit) >> 8;
      sums[d] += digit;
      _mm_storeu_si128((__m128i*)at(d, k), _mm512_cvtepi32_epi8((__m512i)digit));
    }
  }
  Fixed<kDigits> out;
  out.unit = finite ? peak / kLargest : __builtin_nanf("");
  out.total = 0;
  for (int d = 0; d < kDigits; ++d) {
    const int32_t sum = _mm512_reduce_add_epi32((__m512i)sums[d]);
    out.total = out.total * 256 + float(sum);
    out.start[d] = -128 * sum;
  }
  return out;
}

// sum + levels, four to a lane, times four inputs.
inline Ints add_dots(Ints sum, __m512i levels, const int8_t* inputs) {
  const __m512i four = _mm512_set1_epi32(load<int32_t>(inputs));
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, levels, four);
}

// Sums of all digits as one. digit(d): of the d-th.
template <int kDigits, class Digit>
inline Floats join_digits(Digit&& digit) {
  Floats sum = to_floats(digit(0));
#pragma GCC unroll 4
  for (int d = 1; d < kDigits; ++d) sum = sum * 256 + to_floats(digit(d));
  return sum;
}

// A whole row. x: [columns] arranged; digits: [kDigits][columns]; groups: [groups].
template <int kDigits>
void to_fixed(const Plan& plan, const float* x, int8_t* digits, Fixed<kDigits>* groups) {
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t first = g * plan.group_size;
    groups[g] = to_fixed<kDigits>(
        x + first, smaller(plan.group_size, plan.columns - first),
        [&](int d, int64_t k) { return digits + d * plan.columns + first + k; });
  }
}

}  // namespace
}  // namespace precalib

#endif
