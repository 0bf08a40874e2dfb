// Vectors as wide as the registers of an ISA without VBMI, and the operations on them that need an
// intrinsic. A block of 16 rows is one vector with AVX-512, and two parts of 8 rows without.
#pragma once

#include "simd_x86.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#else
constexpr int kWidth = 32;
#endif
constexpr int kParts = kVector / kWidth;
constexpr int kPartRows = kLanes / kParts;

typedef uint16_t Words __attribute__((vector_size(kWidth)));
typedef int32_t Ints __attribute__((vector_size(kWidth)));
typedef uint32_t Unsigneds __attribute__((vector_size(kWidth)));
typedef float Floats __attribute__((vector_size(kWidth)));

inline Words all_bytes(int byte) { return Words{} + uint16_t(byte << 8 | byte); }

#if defined(__AVX512F__)

inline Words shuffle_bytes(Words table, Words index) {
  return (Words)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
}
// Bytes of a where the top bit of the mask's byte is set, of b elsewhere.
inline Words choose_bytes(Words mask, Words a, Words b) {
  return (Words)_mm512_mask_blend_epi8(_mm512_movepi8_mask((__m512i)mask), (__m512i)b, (__m512i)a);
}
inline Ints multiply_words(Words a, Words b) {
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
inline Words multiply_bytes(Words a, Words b) {
  return (Words)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
}

#else

inline Words shuffle_bytes(Words table, Words index) {
  return (Words)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
}
inline Words choose_bytes(Words mask, Words a, Words b) {
  return (Words)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)mask);
}
// Sums of two products of int16.
inline Ints multiply_words(Words a, Words b) {
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
// Saturated sums of two products of unsigned bytes of a and signed ones of b.
inline Words multiply_bytes(Words a, Words b) {
  return (Words)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
}

#endif

// The four bytes at `from` in all lanes.
inline Ints broadcast4(const void* from) { return Ints{} + load<int32_t>(from); }

inline Ints wrapping_add(Ints a, Ints b) { return (Ints)((Unsigneds)a + (Unsigneds)b); }

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

}  // namespace
}  // namespace precalib

#endif
