// Activations in fixed point, quantized per group and row: kSplits int8 splits, which are the
// signed base-256 digits of a value in units of the group's largest magnitude. Two splits are more
// exact than bfloat16, three about as exact as float32. One is coarser, and used only on request.
#pragma once

#include "activations.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Scale and sums of one quantized group of a row of x.
template <int kSplits>
struct QuantizedGroup {
  float unit;              // value of one in the last split
  float total;             // sum of the quantized values, in units
  int32_t start[kSplits];  // -128 times the sum of each split
};

// Quantizes one group of `count` columns of x. at(d, k): where the sixteen int8 values of split d
// from column k on are stored; split 0 is the most significant.
template <int kSplits, class At>
inline QuantizedGroup<kSplits> quantize_group(const float* x, int64_t count, At&& at) {
  // All splits at 127, less what rounding may add.
  constexpr float kLargest = kSplits == 1 ? 127 : kSplits == 2 ? 127 * 257 - 1 : 127 * 65793 - 2;
  I32x16 peaks = {};  // floats of one sign are in the order of their bits, NaN last
  for (int64_t k = 0; k < count; k += kLanes) {
    const I32x16 magnitude = (I32x16)load<F32x16>(x + k) & 0x7fffffff;
    peaks = magnitude > peaks ? magnitude : peaks;
  }
  const float peak = _mm512_reduce_max_ps((__m512)peaks);
  const bool finite = _mm512_reduce_max_epi32((__m512i)peaks) < 0x7f800000;
  // below that, 1 / unit would overflow
  const float inverse = finite && peak > 0x1p-100f ? kLargest / peak : 0;
  I32x16 sums[kSplits] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    I32x16 rest = (I32x16)_mm512_cvtps_epi32((__m512)(load<F32x16>(x + k) * inverse));
    for (int d = kSplits - 1; d >= 0; --d) {
      const I32x16 split = d ? rest << 24 >> 24 : rest;
      rest = (rest - split) >> 8;
      sums[d] += split;
      _mm_storeu_si128((__m128i*)at(d, k), _mm512_cvtepi32_epi8((__m512i)split));
    }
  }
  QuantizedGroup<kSplits> out;
  out.unit = finite ? peak / kLargest : __builtin_nanf("");
  out.total = 0;
  for (int d = 0; d < kSplits; ++d) {
    const int32_t sum = _mm512_reduce_add_epi32((__m512i)sums[d]);
    out.total = out.total * 256 + float(sum);
    out.start[d] = -128 * sum;
  }
  return out;
}

// sum + dot product of four unsigned entries per lane and four int8 values of x.
inline I32x16 add_dot4(I32x16 sum, __m512i entries, const int8_t* inputs) {
  const __m512i four = _mm512_set1_epi32(load<int32_t>(inputs));
  return (I32x16)_mm512_dpbusd_epi32((__m512i)sum, entries, four);
}

// Joins the sums of all splits. split(d): the sums of split d.
template <int kSplits, class Split>
inline F32x16 join_splits(Split&& split) {
  F32x16 sum = to_f32(split(0));
#pragma GCC unroll 4
  for (int d = 1; d < kSplits; ++d) sum = sum * 256 + to_f32(split(d));
  return sum;
}

// Quantizes a whole row. x: [columns] permuted; splits: [kSplits][columns]; groups: [groups].
template <int kSplits>
void quantize_group(const X86Layout& layout, const float* x, int8_t* splits,
                    QuantizedGroup<kSplits>* groups) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t first = g * layout.group_size;
    groups[g] = quantize_group<kSplits>(
        x + first, min(layout.group_size, layout.columns - first),
        [&](int d, int64_t k) { return splits + d * layout.columns + first + k; });
  }
}

}  // namespace
}  // namespace precalib

#endif
