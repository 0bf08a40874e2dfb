// Many rows of x in bfloat16: weights with their scales, and salient weights in their places.
#pragma once

#include "gemm_bf16_panel.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kSpanColumns = 1024;  // about: whole groups

// a in the lower halves of lanes, b in the upper, cut off. Values are made larger beforehand by what
// that takes from a mantissa on average: 2**-8 * log2(e) / 2 of it.
constexpr float kBeforeCut = 1 + 0.00282f;
inline Words cut_pairs(Floats a, Floats b) {
  return select(Words{} + 0xffff0000u, (Words)b, (Words)a >> 16);
}

// Byte s of each lane as the second byte of a float: 128 + byte / 256.
template <int s>
inline Floats floats_of_byte(Words bytes) {
  const Words base = Words{} + 0x43000000;
  if constexpr (s == 1) return (Floats)select(Words{} + 0xff00, bytes, base);
  const __m512i from = _mm512_broadcast_i32x4(_mm_setr_epi8(
      0, s, 0, 0, 0, s + 4, 0, 0, 0, s + 8, 0, 0, 0, s + 12, 0, 0));
  return (Floats)_mm512_mask_shuffle_epi8((__m512i)base, 0x2222222222222222, (__m512i)bytes, from);
}

// A way to make weights, see `gemm_bf16_panel.h`.
template <int kLevelBits>
class Merge {
 public:
  static constexpr int kBits = kLevelBits;
  static constexpr bool kScaled = true;
  static int64_t span_columns(const Plan& plan) {
    const int64_t groups = kSpanColumns / plan.group_size;
    return smaller((groups ? groups : 1) * plan.group_size, plan.columns);
  }

  explicit Merge(const Plan& plan)
      : plan_(plan), shifted_(shifted_levels<kBits>(plan, 128)), salient_(plan) {}

  struct Begun {
    Floats scale, offset;  // weight = scale * what floats_of_byte makes of a level + offset
  };

  Begun open(const Block& block, const Group& group) {
    // (256 (128 + (level + 128) / 256) - 32896) * scale, where 32896 * scale is exact
    const Floats larger = group_scales(plan_, block, group) * kBeforeCut;
    const Floats scale = (Floats)(((Words)larger + 0x100) & ~0x1ffu);
    const Floats offset = -32896 * scale;
    salient_.find(plan_, block, group, [](Floats value) { return value; });
    return {256 * scale, offset - group_zeros(plan_, group) * scale};
  }

  auto writer(const Begun& begun) const {
    return [table = shifted_, scale = begun.scale, offset = begun.offset](Shorts index, uint16_t* out)
               __attribute__((always_inline)) {
      const Words levels = (Words)table.find(index);
      const auto weights = [&]<int s>(std::integral_constant<int, s>) {
        return floats_of_byte<s>(levels) * scale + offset;
      };
      store(out, cut_pairs(weights(std::integral_constant<int, 0>{}),
                           weights(std::integral_constant<int, 2>{})));
      store(out + 2 * kLanes, cut_pairs(weights(std::integral_constant<int, 1>{}),
                                        weights(std::integral_constant<int, 3>{})));
    };
  }

  void close(const Begun&, uint16_t* to, int64_t) const { salient_.put(to); }

 private:
  const Plan& plan_;
  const Table<kBits + 2> shifted_;
  Replacements salient_;
};

}  // namespace
}  // namespace precalib

#endif
