// Panels of dequantized weights for the BF16 GEMM, for large M: bfloat16 weights with their scales,
// and salient weights in place of base weights.
#pragma once

#include "gemm_bf16_panel.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kPanelColumns = 1024;  // at most, in whole groups; one group if that is larger

// Truncates a and b to bfloat16: a to the lower half of each lane, b to the upper. Truncation loses
// 2**-8 * log2(e) / 2 of a mantissa on average, so values are multiplied by 1 plus that before.
constexpr float kTruncationBias = 1 + 0.00282f;
inline U32x16 truncate_pairs(F32x16 a, F32x16 b) {
  return select(U32x16{} + 0xffff0000u, (U32x16)b, (U32x16)a >> 16);
}

// Byte s of each lane as float32, by placing it in a mantissa: 128 + byte / 256.
template <int s>
inline F32x16 byte_to_f32(U32x16 bytes) {
  const U32x16 base = U32x16{} + 0x43000000;
  if constexpr (s == 1) return (F32x16)select(U32x16{} + 0xff00, bytes, base);
  const __m512i from = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, s, 0, 0, 0, s + 4, 0, 0, 0, s + 8, 0, 0, 0, s + 12, 0, 0));
  return (F32x16)_mm512_mask_shuffle_epi8((__m512i)base, 0x2222222222222222, (__m512i)bytes, from);
}

// A panel policy, see `gemm_bf16_panel.h`.
template <int kCodeBits>
class DequantizedPanel {
 public:
  static constexpr int kBits = kCodeBits;
  static constexpr bool kDequantized = true;
  static int64_t panel_columns(const X86Layout& layout) {
    const int64_t groups = kPanelColumns / layout.group_size;
    return min((groups ? groups : 1) * layout.group_size, layout.columns);
  }

  explicit DequantizedPanel(const X86Layout& layout)
      : layout_(layout), shifted_(codebook_table<kBits>(layout, 128)), salient_(layout) {}

  struct GroupState {
    F32x16 scale, offset;  // weight = scale * byte_to_f32(entry + 128) + offset
  };

  GroupState begin_group(const Block& block, const Group& group) {
    // entry * scale = (256 (128 + (entry + 128) / 256) - 32896) * scale; 32896 * scale is exact
    const F32x16 larger = group_scales(layout_, block, group) * kTruncationBias;
    const F32x16 scale = (F32x16)(((U32x16)larger + 0x100) & ~0x1ffu);
    const F32x16 offset = -32896 * scale;
    salient_.prepare(layout_, block, group, [](F32x16 value) { return value; });
    return {256 * scale, offset - group_zeros(layout_, group) * scale};
  }

  auto writer(const GroupState& state) const {
    return [table = shifted_, scale = state.scale, offset = state.offset](
               U16x32 index, uint16_t* out) __attribute__((always_inline)) {
      const U32x16 entries = (U32x16)table.lookup(index);
      const auto weights = [&]<int s>(std::integral_constant<int, s>) {
        return byte_to_f32<s>(entries) * scale + offset;
      };
      store(out, truncate_pairs(weights(std::integral_constant<int, 0>{}),
                                weights(std::integral_constant<int, 2>{})));
      store(out + 2 * kLanes, truncate_pairs(weights(std::integral_constant<int, 1>{}),
                                             weights(std::integral_constant<int, 3>{})));
    };
  }

  void end_group(const GroupState&, uint16_t* to, int64_t) const { salient_.scatter(to); }

 private:
  const X86Layout& layout_;
  const ByteTable<kBits + 2> shifted_;
  SalientScatter salient_;
};

}  // namespace
}  // namespace precalib

#endif
