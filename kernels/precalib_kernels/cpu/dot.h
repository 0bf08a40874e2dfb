// Few rows of x: exact integer sums of levels times inputs in fixed point, scaled group by group.
//
// An input becomes kDigits signed base-256 digits in units of its group's largest magnitude, which
// is finer than the same values in bfloat16 (two digits) or about float32 (three). Levels are
// shifted by 128 to be unsigned for VPDPBUSD; the sums start at what that adds.
#pragma once

#include "plain.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int kDotRows = 4;

// A group of one row of x in fixed point.
template <int kDigits>
struct Fixed {
  float unit;             // value of the last digit's one
  float total;            // sum of the digits' values, in units
  int32_t start[kDigits];  // -128 times the sum of each digit
};

// x: [columns] arranged; digits: [kDigits][columns], highest first; groups: [groups].
template <int kDigits>
void to_fixed(const Plan& plan, const float* x, int8_t* digits, Fixed<kDigits>* groups) {
  // All digits at 127, less what rounding may add.
  constexpr float kLargest = kDigits == 2 ? 127 * 257 - 1 : 127 * 65793 - 2;
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t first = g * plan.group_size;
    const int64_t count = smaller(plan.group_size, plan.columns - first);
    Ints peaks = {};  // magnitudes of floats are in the order of their bits, not-a-number last
    for (int64_t k = 0; k < count; k += kLanes) {
      const Ints magnitude = (Ints)load<Floats>(x + first + k) & 0x7fffffff;
      peaks = magnitude > peaks ? magnitude : peaks;
    }
    const float peak = _mm512_reduce_max_ps((__m512)peaks);
    const bool finite = _mm512_reduce_max_epi32((__m512i)peaks) < 0x7f800000;
    const float unit = finite ? peak / kLargest : __builtin_nanf("");
    // a row of tiny numbers: 1 / unit would overflow
    const float inverse = finite && peak > 0x1p-100f ? kLargest / peak : 0;
    Ints sums[kDigits] = {};
    for (int64_t k = 0; k < count; k += kLanes) {
      Ints rest = (Ints)_mm512_cvtps_epi32((__m512)(load<Floats>(x + first + k) * inverse));
      for (int d = kDigits - 1; d >= 0; --d) {
        const Ints digit = d ? rest << 24 >> 24 : rest;
        rest = (rest - digit) >> 8;
        sums[d] += digit;
        _mm_storeu_si128((__m128i*)(digits + d * plan.columns + first + k),
                         _mm512_cvtepi32_epi8((__m512i)digit));
      }
    }
    Fixed<kDigits>& out = groups[g];
    out.unit = unit;
    out.total = 0;
    for (int d = 0; d < kDigits; ++d) {
      const int32_t sum = _mm512_reduce_add_epi32((__m512i)sums[d]);
      out.total = out.total * 256 + float(sum);
      out.start[d] = -128 * sum;
    }
  }
}

// sums: [kRows][16]; x: [kRows][columns], digits and groups as above for each row.
template <int kBits, int kDigits, int kRows>
void dot_block(const Plan& plan, const Block& block, const float* x, const int8_t* digits,
               const Fixed<kDigits>* groups, float* sums) {
  constexpr int kChains = kRows * kDigits < 4 ? 2 : 1;  // sums at a time, against latency
  int8_t shifted[128];
  for (int i = 0; i < 128; ++i) shifted[i] = int8_t(plan.levels[i] ^ 0x80);
  const Table<kBits + 2> unsigned_levels(shifted), levels(plan.levels);
  Floats total[kRows] = {};
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Group group = find_group(plan, block, g);
    Ints sum[kChains][kRows][kDigits] = {};
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < kDigits; ++d)
        sum[0][r][d] = Ints{} + groups[r * plan.groups + g].start[d];
    const int8_t* const inputs = digits + group.first;
    decode<kBits>(group.planes, group.chunks, [&](int64_t step, Shorts index, auto i) {
      const __m512i weights = (__m512i)unsigned_levels.find(index);
      for (int r = 0; r < kRows; ++r)
        for (int d = 0; d < kDigits; ++d) {
          Ints& to = sum[i % kChains][r][d];
          const int8_t* const from = inputs + (r * kDigits + d) * plan.columns + 4 * step;
          to = (Ints)_mm512_dpbusd_epi32((__m512i)to, weights,
                                         _mm512_set1_epi32(load<int32_t>(from)));
        }
    });
    const Floats scale = group_scales(plan, block, group);
    const Floats zero = plan.uniform ? floats_of_bytes(group.zeros) : Floats{};
    for (int r = 0; r < kRows; ++r) {
      const Fixed<kDigits>& fixed = groups[r * plan.groups + g];
      Floats dot = {};
      for (int d = 0; d < kDigits; ++d) {
        Ints digit = sum[0][r][d];
        for (int c = 1; c < kChains; ++c) digit += sum[c][r][d];
        dot = dot * 256 + to_floats(digit);
      }
      total[r] += (dot - zero * fixed.total) * (scale * fixed.unit);
    }
    for (int64_t j = 0; j < plan.salient_count; ++j) {
      const Salient salient = find_salient<kBits>(plan, block, group, levels, j);
      const Floats base = (salient.level - zero) * scale;
      const Floats change = (Floats)((Ints)(salient.value - base) & salient.used);
      for (int r = 0; r < kRows; ++r)
        total[r] += change * look_up(x + r * plan.columns + group.first, salient.position);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, total[r]);
}

}  // namespace
}  // namespace precalib

#endif
