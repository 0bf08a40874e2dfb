// Tens of rows of x in bfloat16: levels, which it holds exactly, with salient weights in units of the
// scale in their places; a group's products are scaled and added up. Takes less than to scale the
// weights, as `panel_dequantized.h` does, where rows are few or groups large.
// Not for uniform levels, which have zero points.
#pragma once

#include "gemm_bf16_panel.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

// A way to make weights, see `gemm_bf16_panel.h`.
template <int kLevelBits>
class Levels {
 public:
  static constexpr int kBits = kLevelBits;
  static constexpr bool kScaled = false;
  static int64_t span_columns(const Plan& plan) { return smaller(plan.group_size, plan.columns); }

  explicit Levels(const Plan& plan) : plan_(plan), levels_(plan), salient_(plan) {}

  struct Begun {
    Floats scale;
    Ints none;  // where there are only salient weights, in units of one
  };

  Begun open(const Block& block, const Group& group) {
    const Floats found = group_scales(plan_, block, group);
    const Ints none = found == 0;
    const Floats scale = (Floats)select(none, Ints{} + 0x3f800000, (Ints)found);
    const Floats inverse = (Floats)_mm512_rcp14_ps((__m512)scale);
    salient_.find(plan_, block, group, [=](Floats value) { return value * inverse; });
    return {scale, none};
  }

  auto writer(const Begun&) const {
    return [levels = levels_](Shorts index, uint16_t* out) __attribute__((always_inline)) {
      const auto [even, odd] = levels.find(index);
      store(out, even);
      store(out + 2 * kLanes, odd);
    };
  }

  void close(const Begun& begun, uint16_t* to, int64_t columns) const {
    if (_mm512_movepi32_mask((__m512i)begun.none))
      for (int64_t at = 0; at < columns * kLanes; at += 2 * kLanes)
        store(to + at, load<Ints>(to + at) & ~begun.none);
    salient_.put(to);
  }

 private:
  const Plan& plan_;
  const BfloatLevels<kBits> levels_;
  Replacements salient_;
};

}  // namespace
}  // namespace precalib

#endif
