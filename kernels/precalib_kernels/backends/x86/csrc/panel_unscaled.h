// Panels of codebook entries for the BF16 GEMM, for medium M: entries, which bfloat16 holds
// exactly, and salient weights in units of the group's scale in place of base weights. The sums of
// a group are scaled, which costs less than scaling its weights (`panel_dequantized.h`) where M is
// small or groups are large. Not for uniform grids, which have zero points.
#pragma once

#include "gemm_bf16_panel.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

// A panel policy, see `gemm_bf16_panel.h`.
template <int kCodeBits>
class UnscaledPanel {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr bool kDequantized = false;
  static int64_t panel_columns(const X86Layout& layout) {
    return min(layout.group_size, layout.columns);
  }

  explicit UnscaledPanel(const X86Layout& layout)
      : layout_(layout), codebook_(layout), salient_(layout) {}

  struct GroupState {
    F32x16 scale;
    I32x16 none;  // -1 in rows whose scale is zero: salient weights in units of one, no base
  };

  GroupState begin_group(const Block& block, const Group& group) {
    const F32x16 found = group_scales(layout_, block, group);
    const I32x16 none = found == 0;
    const F32x16 scale = (F32x16)select(none, I32x16{} + 0x3f800000, (I32x16)found);
    const F32x16 inverse = (F32x16)_mm512_rcp14_ps((__m512)scale);
    salient_.prepare(layout_, block, group, [=](F32x16 value) { return value * inverse; });
    return {scale, none};
  }

  auto writer(const GroupState&) const {
    return [codebook = codebook_](U16x32 index, uint16_t* out) __attribute__((always_inline)) {
      const auto [even, odd] = codebook.lookup(index);
      store(out, even);
      store(out + 2 * kLanes, odd);
    };
  }

  void end_group(const GroupState& state, uint16_t* to, int64_t columns) const {
    if (_mm512_movepi32_mask((__m512i)state.none))
      for (int64_t at = 0; at < columns * kLanes; at += 2 * kLanes)
        store(to + at, load<I32x16>(to + at) & ~state.none);
    salient_.scatter(to);
  }

 private:
  const X86Layout& layout_;
  const Bf16Codebook<kBits> codebook_;
  SalientScatter salient_;
};

}  // namespace
}  // namespace precalib

#endif
