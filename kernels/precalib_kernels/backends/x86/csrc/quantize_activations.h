// Activations in fixed point, quantized per group and row: kSplits int8 splits, which are the
// signed base-256 digits of a value in units of the group's largest magnitude. Two splits are more
// exact than bfloat16, three about as exact as float32. One is coarser, and used only on request.
// Splits of int16 are base-65536 digits: one is as exact as two of int8.
#pragma once

#include "activations.h"
#include "simd_integers.h"

namespace precalib {
namespace {

// The largest value in splits: all of them at their largest, less what rounding may add.
template <int kSplits, class Split>
constexpr float kLargestSplit = sizeof(Split) == 1 ? (kSplits == 1   ? 127
                                                      : kSplits == 2 ? 127 * 257 - 1
                                                                     : 127 * 65793 - 2)
                                                   : (kSplits == 1 ? 32766 : 32767 * 65537L - 895);

// Scale and sums of one quantized group of a row of x.
template <int kSplits>
struct QuantizedGroup {
  float unit;              // value of one in the last split
  float total;             // sum of the quantized values, in units
  int32_t start[kSplits];  // -128 times the sum of each split
};

// Quantizes one group of `count` columns of x. at(d, k): where the sixteen values of split d from
// column k on are stored; split 0 is the most significant. largest: in units.
template <int kSplits, class Split = int8_t, class At>
inline QuantizedGroup<kSplits> quantize_group(const float* x, int64_t count, At&& at,
                                              float largest = kLargestSplit<kSplits, Split>) {
  constexpr int kBits = 8 * sizeof(Split);
  I32x16 peaks = {};  // floats of one sign are in the order of their bits, NaN last
  for (int64_t k = 0; k < count; k += kLanes) {
    const I32x16 magnitude = (I32x16)load<F32x16>(x + k) & 0x7fffffff;
    peaks = magnitude > peaks ? magnitude : peaks;
  }
  const int32_t bits = reduce_max(peaks);
  if (bits >= 0x7f800000) {  // infinite or not a number: so are the products, by the unit
    for (int64_t k = 0; k < count; k += kLanes)
      for (int d = 0; d < kSplits; ++d) store_narrow(at(d, k), I32x16{});
    return {__builtin_nanf(""), 0, {}};
  }
  const float peak = load<float>(&bits);
  // below that, 1 / unit would overflow
  const float inverse = peak > 0x1p-100f ? largest / peak : 0;
  I32x16 sums[kSplits] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    I32x16 rest = round_to_int(load<F32x16>(x + k) * inverse);
    for (int d = kSplits - 1; d >= 0; --d) {
      const I32x16 split = d ? rest << (32 - kBits) >> (32 - kBits) : rest;
      rest = (rest - split) >> kBits;
      sums[d] += split;
      store_narrow(at(d, k), split);
    }
  }
  QuantizedGroup<kSplits> out = {peak / largest, 0, {}};
  for (int d = 0; d < kSplits; ++d) {
    const int32_t sum = reduce_add(sums[d]);
    out.total = out.total * float(1 << kBits) + float(sum);
    out.start[d] = -128 * sum;
  }
  return out;
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

// sum + dot product of four unsigned entries per lane and four int8 values of x.
inline I32x16 add_dot4(I32x16 sum, __m512i entries, const int8_t* inputs) {
  const __m512i four = _mm512_set1_epi32(load<int32_t>(inputs));
  return (I32x16)_mm512_dpbusd_epi32((__m512i)sum, entries, four);
}

#endif

// Joins the sums of all splits. split(d): the sums of split d.
template <int kSplits, int kBase = 256, class Split>
inline F32x16 join_splits(Split&& split) {
  F32x16 sum = to_f32(split(0));
#pragma GCC unroll 4
  for (int d = 1; d < kSplits; ++d) sum = sum * float(kBase) + to_f32(split(d));
  return sum;
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

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

#endif

}  // namespace
}  // namespace precalib
