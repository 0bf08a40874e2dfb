// Few rows of x: exact integer sums of levels times inputs in fixed point, scaled group by group.
//
// Levels are shifted by 128 to be unsigned for VPDPBUSD; the sums start at what that adds.
#pragma once

#include "quantize_activations.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Inputs of a group in the places of salient weights: by permutes of at most 64 or 128 inputs, which
// take the first where none is used, or from memory.
inline Floats of_group(const float* x, int64_t columns, const Salient& salient) {
  const Ints at = salient.position;
  const auto among = [&](int first) {  // of 32
    return (Floats)_mm512_permutex2var_ps(load<__m512>(x + first), (__m512i)at,
                                          load<__m512>(x + first + kLanes));
  };
  const auto choose = [&](int bit, Floats set, Floats clear) {
    return (Floats)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)at, _mm512_set1_epi32(bit)),
                                        (__m512)clear, (__m512)set);
  };
  if (columns > 128) return look_up(x, at & salient.used);
  const Floats low = choose(32, among(32), among(0));
  return columns > 64 ? choose(64, choose(32, among(96), among(64)), low) : low;
}

// sums: [kRows][16]; x: [kRows][columns], digits and groups as above for each row.
template <int kBits, int kDigits, int kRows>
void dot_block(const Plan& plan, const Block& block, const float* x, const int8_t* digits,
               const Fixed<kDigits>* groups, float* sums) {
  constexpr int kChains = kRows * kDigits < 4 ? 2 : 1;  // sums at a time, against latency
  const Table<kBits + 2> unsigned_levels = shifted_levels<kBits>(plan, 128);
  Floats total[kRows] = {};
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Group group = find_group(plan, block, g);
    fetch_side(plan, group, 1);
    Ints sum[kChains][kRows][kDigits] = {};
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < kDigits; ++d)
        sum[0][r][d] = Ints{} + groups[r * plan.groups + g].start[d];
    const int8_t* const inputs = digits + group.first;
    const auto add = [&](int64_t step, Shorts index, auto i) {
      const __m512i weights = (__m512i)unsigned_levels.find(index);
      for (int r = 0; r < kRows; ++r)
        for (int d = 0; d < kDigits; ++d) {
          Ints& to = sum[i % kChains][r][d];
          to = add_dots(to, weights, inputs + (r * kDigits + d) * plan.columns + 4 * step);
        }
    };
    decode<kBits>(group.planes, group.chunks, plan.block_bytes, add);
    const Floats scale = group_scales(plan, block, group);
    const Floats zero = group_zeros(plan, group);
    for (int r = 0; r < kRows; ++r) {
      const Fixed<kDigits>& fixed = groups[r * plan.groups + g];
      const Floats dot = join_digits<kDigits>([&](int d) {
        Ints digit = sum[0][r][d];
        for (int c = 1; c < kChains; ++c) digit += sum[c][r][d];
        return digit;
      });
      total[r] += (dot - zero * fixed.total) * (scale * fixed.unit);
    }
    for (int64_t j = 0; j < plan.salient_count; ++j) {
      const Salient salient = find_salient(plan, block, group, j);
      const Floats base = (salient.level - zero) * scale;
      const Floats change = (Floats)((Ints)(salient.value - base) & salient.used);
      for (int r = 0; r < kRows; ++r)
        total[r] += change * of_group(x + r * plan.columns + group.first, group.columns, salient);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, total[r]);
}

}  // namespace
}  // namespace precalib

#endif
