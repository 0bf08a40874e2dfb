// Scales, zero points and salient weights of the groups of a packed weight.
#pragma once

#include "../../x86/csrc/blocks.h"
#include "decode.h"

namespace precalib {
namespace {

// Scales of the group, float32.
inline F32x16 group_scales(const PackedLayout& layout, const Block& block, const Group& group) {
  F32x16 out;
  if (layout.log_scales) {
    const I32x16 codes = load_u8(group.scales);
    const FloatTable factors(layout.factors);
    for (int p = 0; p < kParts; ++p) {
      const I32x4 code = codes.part[p];
      const I32x4 power = factors.lookup(code) - ((code & 0xf0) << 19);  // minus the power of two
      out.part[p] = (F32x4)(power & (I32x4)(code < 255));
    }
  } else {
    for (int p = 0; p < kParts; ++p) out.part[p] = load_fp16(group.scales + p * 2 * kPart);
  }
  for (int p = 0; p < kParts; ++p) out.part[p] *= load<F32x4>(block.row_values + p * kPart);
  return out;
}

// Zero points of the group, float32; zeros with a codebook, which has none.
inline F32x16 group_zeros(const PackedLayout& layout, const Group& group) {
  F32x16 out = {};
  if (!layout.uniform) return out;
  const I32x16 zeros = load_u8(group.zeros);
  for (int p = 0; p < kParts; ++p) out.part[p] = to_f32(zeros.part[p]);
  return out;
}

// What a salient weight of each row differs by from the base weight that it replaces.
struct SalientResidual {
  alignas(16) float delta[kLanes];
  const uint8_t* positions;  // as the layout has them; in unused slots of a column of zeros
  int64_t column;            // of tiles of x, to which positions are added
};

// Decodes the slots of a group. out: [salient_count]; column: where the group begins in tiles of x.
template <bool kSigned, bool kUniform>
inline void find_residuals(const PackedLayout& layout, const Block& block, const Group& group,
                           const F32x16& scale, const F32x16& zero, int64_t column,
                           SalientResidual* out) {
  F32x4 step[kParts], offset[kParts], factor[kParts], zeros[kParts];
  for (int p = 0; p < kParts; ++p) {
    step[p] = load<F32x4>(block.row_values + kLanes + p * kPart);
    offset[p] = load<F32x4>(block.row_values + 2 * kLanes + p * kPart);
    factor[p] = scale.part[p];
    if constexpr (kUniform) zeros[p] = zero.part[p];
  }
  const uint8_t* at = group.salient;
  const int64_t count = layout.salient_count, positions = kLanes * layout.position_bytes;
  for (int64_t slot = 0; slot < count; ++slot, at += positions + 2 * kLanes, ++out) {
    out->positions = at;
    out->column = column;
    const I32x16 codes = load_u8(at + positions), entries = load_i8(at + positions + kLanes);
    for (int p = 0; p < kParts; ++p) {
      const I32x4 code = codes.part[p];
      F32x4 value = fused_add(offset[p], to_f32(kSigned ? code & 127 : code), step[p]);
      if constexpr (kSigned) value = (F32x4)((I32x4)value ^ (code & 128) << 24);
      F32x4 entry = to_f32(entries.part[p]);
      if constexpr (kUniform) entry -= zeros[p];
      store(out->delta + p * kPart, value - entry * factor[p]);
    }
  }
}

}  // namespace
}  // namespace precalib
