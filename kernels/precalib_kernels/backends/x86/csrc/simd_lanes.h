// Loads and lookups by lanes of 32 bits, for the sixteen rows of a block or for as many as a
// register holds.
#pragma once

#include "simd_x86.h"

namespace precalib {
namespace {

struct SixteenLanes {
  using F = F32x16;
  using I = I32x16;
  static I load_u8(const void* from) { return precalib::load_u8(from); }
  static I load_i8(const void* from) { return precalib::load_i8(from); }
  static I load_u16(const void* from) { return precalib::load_u16(from); }
  static F load_fp16(const void* from) { return precalib::load_fp16(from); }
  static I permute16(const float* values, I at) { return precalib::permute16(values, at); }
  static F gather(const float* table, I at) { return precalib::gather(table, at); }
};

#if defined(__AVX512F__)

using NativeLanes = SixteenLanes;

#else

struct EightLanes {
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static I load_u8(const void* from) {
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  }
  static I load_i8(const void* from) {
    return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
  }
  static I load_u16(const void* from) { return (I)_mm256_cvtepu16_epi32(load<__m128i>(from)); }
  static F load_fp16(const void* from) { return (F)_mm256_cvtph_ps(load<__m128i>(from)); }
  // values[at % 16], lane by lane.
  static I permute16(const float* values, I at) {
    const __m256 low = _mm256_permutevar8x32_ps(load<__m256>(values), (__m256i)at);
    const __m256 high = _mm256_permutevar8x32_ps(load<__m256>(values + 8), (__m256i)at);
    return (I)_mm256_blendv_ps(low, high, (__m256)(at << 28));
  }
  static F gather(const float* table, I at) {
    return (F)_mm256_i32gather_ps(table, (__m256i)at, 4);
  }
};
using NativeLanes = EightLanes;

#endif

}  // namespace
}  // namespace precalib
