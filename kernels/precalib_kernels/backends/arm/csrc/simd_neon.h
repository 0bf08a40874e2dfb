// SIMD types and operations for Arm: vectors of 16 bytes, and the only place with NEON intrinsics.
// All of it has internal linkage, so that each ISA has its own copy.
#pragma once

#if defined(__clang__)
#error "the kernels need GCC: clang's code calls an OpenMP runtime other than the one torch loads"
#endif

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../../x86/csrc/isa_dispatch.h"
#include "../../x86/csrc/memory.h"

namespace precalib {
namespace {

using PackedLayout = X86Layout;  // both backends share the struct; `decode.h` says what differs

using U8x16 = uint8x16_t;
using I8x16 = int8x16_t;
using I8x8 = int8x8_t;
using U16x4 = uint16x4_t;
using U32x4 = uint32x4_t;
using I32x4 = int32x4_t;
using F32x4 = float32x4_t;

constexpr int kParts = 4;               // vectors of a block: each has four rows
constexpr int kPart = kLanes / kParts;  // rows of a part

// A value of each row of a block.
struct F32x16 {
  F32x4 part[kParts];
};
struct I32x16 {
  I32x4 part[kParts];
};

constexpr int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

inline void prefetch(const uint8_t* from) { __builtin_prefetch(from); }

// Bytes: shifts, and the instructions that shift into a part of another vector.
template <int kBy>
inline U8x16 shift_left(U8x16 v) {
  return vshlq_n_u8(v, kBy);
}
template <int kBy>
inline U8x16 shift_right(U8x16 v) {
  if constexpr (kBy == 0) return v;
  else return vshrq_n_u8(v, kBy);
}
// The low kBy bits of `low`, and v above them.
template <int kBy>
inline U8x16 insert_above(U8x16 low, U8x16 v) {
  return vsliq_n_u8(low, v, kBy);
}
// Each byte of a 32-bit lane moves to the next one, and the first becomes zero.
inline U8x16 next_byte(U8x16 v) { return (U8x16)vshlq_n_u32((uint32x4_t)v, 8); }

inline U8x16 all_bytes(int byte) { return vdupq_n_u8(uint8_t(byte)); }

// Bits of a where the mask is set, of b elsewhere.
inline U8x16 select(U8x16 mask, U8x16 a, U8x16 b) { return vbslq_u8(mask, a, b); }

// A table of 16, 32 or 64 int8 values. Indices must be smaller than that.
template <int kSize>
struct ByteTable {
  std::conditional_t<kSize == 16, int8x16_t,
                     std::conditional_t<kSize == 32, int8x16x2_t, int8x16x4_t>>
      table;
  explicit ByteTable(const int8_t* values) {
    if constexpr (kSize == 16) table = vld1q_s8(values);
    else if constexpr (kSize == 32) table = vld1q_s8_x2(values);
    else table = vld1q_s8_x4(values);
  }
  I8x16 lookup(U8x16 index) const {
    if constexpr (kSize == 16) return vqtbl1q_s8(table, index);
    else if constexpr (kSize == 32) return vqtbl2q_s8(table, index);
    else return vqtbl4q_s8(table, index);
  }
};

// Each lane of sum plus the product of its four bytes of a with bytes 4 * kStep … of b.
template <int kStep>
inline I32x4 add_dot4(I32x4 sum, I8x16 a, I8x16 b) {
  return vdotq_laneq_s32(sum, a, b, kStep);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// sum [2][2] plus a [2][8] times b [2][8] transposed.
inline I32x4 add_2x2(I32x4 sum, I8x16 a, I8x16 b) { return vmmlaq_s32(sum, a, b); }
#endif

// Lanes 0 and 1 (2 and 3) of both, alternating.
inline I8x16 zip_low(I8x16 a, I8x16 b) { return (I8x16)vzip1q_s32((I32x4)a, (I32x4)b); }
inline I8x16 zip_high(I8x16 a, I8x16 b) { return (I8x16)vzip2q_s32((I32x4)a, (I32x4)b); }
// Even (odd) lanes of both.
inline I32x4 even_lanes(I32x4 a, I32x4 b) { return vuzp1q_s32(a, b); }
inline I32x4 odd_lanes(I32x4 a, I32x4 b) { return vuzp2q_s32(a, b); }

inline F32x4 broadcast(float v) { return vdupq_n_f32(v); }
inline I32x4 broadcast(int32_t v) { return vdupq_n_s32(v); }
inline F32x4 to_f32(I32x4 v) { return vcvtq_f32_s32(v); }
inline I32x4 round_to_i32(F32x4 v) { return vcvtnq_s32_f32(v); }
inline F32x4 fused_add(F32x4 sum, F32x4 a, F32x4 b) { return vfmaq_f32(sum, a, b); }
// sum + a * b[kLane].
template <int kLane>
inline F32x4 fused_add_lane(F32x4 sum, F32x4 a, F32x4 b) {
  return vfmaq_laneq_f32(sum, a, b, kLane);
}
inline I32x4 larger(I32x4 a, I32x4 b) { return vmaxq_s32(a, b); }
inline int32_t largest_lane(I32x4 v) { return vmaxvq_s32(v); }
inline int32_t sum_of_lanes(I32x4 v) { return vaddvq_s32(v); }

// The low bytes of eight lanes.
inline I8x8 narrow_to_i8(I32x4 a, I32x4 b) {
  return vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b)));
}

// Sixteen values as 32-bit lanes.
inline I32x16 widen(uint16x8_t low, uint16x8_t high) {
  return {{(I32x4)vmovl_u16(vget_low_u16(low)), (I32x4)vmovl_high_u16(low),
           (I32x4)vmovl_u16(vget_low_u16(high)), (I32x4)vmovl_high_u16(high)}};
}
inline I32x16 load_u16(const void* from) {
  return widen(load<uint16x8_t>(from), load<uint16x8_t>((const char*)from + 16));
}
inline I32x16 load_u8(const void* from) {
  const U8x16 v = load<U8x16>(from);
  return widen(vmovl_u8(vget_low_u8(v)), vmovl_high_u8(v));
}
inline I32x16 load_i8(const void* from) {
  const I8x16 v = load<I8x16>(from);
  const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
           vmovl_high_s16(high)}};
}

inline F32x4 load_fp16(const void* from) { return vcvt_f32_f16((float16x4_t)load<U16x4>(from)); }
inline F32x4 load_bf16(const void* from) { return (F32x4)vshll_n_u16(load<U16x4>(from), 16); }
inline U16x4 to_fp16(F32x4 v) { return (U16x4)vcvt_f16_f32(v); }
inline U16x4 to_bf16(F32x4 v) {  // to nearest even; NaN stays NaN
  const U32x4 bits = (U32x4)v;
  const U32x4 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return vshrn_n_u32(vbslq_u32((U32x4)(v == v), rounded, bits | 0x400000), 16);
}

// Loads four values of a type as float32.
template <Type kType>
inline F32x4 load_floats(const void* from, int64_t at) {
  if constexpr (kType == kFloat32) return load<F32x4>((const float*)from + at);
  else if constexpr (kType == kFloat16) return load_fp16((const uint16_t*)from + at);
  else return load_bf16((const uint16_t*)from + at);
}

// values[at % 16], lane by lane: a look-up of the four bytes of each float.
struct FloatTable {
  uint8x16x4_t bytes;
  explicit FloatTable(const float* values) { std::memcpy(&bytes, values, 64); }
  I32x4 lookup(I32x4 at) const {
    const U32x4 index = ((U32x4)at & 15) * 0x04040404u + 0x03020100u;
    return (I32x4)vqtbl4q_u8(bytes, (U8x16)index);
  }
};

// Stores four vectors so that their lanes alternate: lane t of vector s goes to 4 * t + s.
inline void store_alternating(float* to, F32x4 a, F32x4 b, F32x4 c, F32x4 d) {
  vst4q_f32(to, (float32x4x4_t{{a, b, c, d}}));
}

// Rows of four floats become columns.
inline void transpose(F32x4* v) {
  const float32x4x2_t low = vtrnq_f32(v[0], v[1]), high = vtrnq_f32(v[2], v[3]);
  const auto join = [](F32x4 a, F32x4 b, bool upper) {
    const float64x2_t c = (float64x2_t)a, d = (float64x2_t)b;
    return (F32x4)(upper ? vzip2q_f64(c, d) : vzip1q_f64(c, d));
  };
  v[0] = join(low.val[0], high.val[0], false);
  v[1] = join(low.val[1], high.val[1], false);
  v[2] = join(low.val[0], high.val[0], true);
  v[3] = join(low.val[1], high.val[1], true);
}

}  // namespace
}  // namespace precalib
