// Rounding sixteen lanes to integers, narrowing them, and reducing them to one value.
#pragma once

#include "simd_x86.h"

namespace precalib {
namespace {

#if defined(__AVX512F__)

inline I32x16 round_to_int(F32x16 v) { return (I32x16)_mm512_cvtps_epi32((__m512)v); }

inline int32_t reduce_max(I32x16 v) { return _mm512_reduce_max_epi32((__m512i)v); }

inline int32_t reduce_add(I32x16 v) { return _mm512_reduce_add_epi32((__m512i)v); }

// Stores sixteen lanes that fit into int8.
inline void store_narrow(int8_t* to, I32x16 v) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
}

inline void store_narrow(int16_t* to, I32x16 v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)v));
}

#else

inline I32x16 round_to_int(F32x16 v) {
  return convert_by_256_bits<I32x16>(
      &v, 32, [](const char* at) { return _mm256_cvtps_epi32(load<__m256>(at)); });
}

template <class Vector, class Join>
inline auto reduce(Vector v, Join&& join) {
  auto out = v[0];
  for (int lane = 1; lane < kLanes; ++lane) out = join(out, v[lane]);
  return out;
}

inline int32_t reduce_max(I32x16 v) {
  return reduce(v, [](int32_t a, int32_t b) { return a > b ? a : b; });
}

inline int32_t reduce_add(I32x16 v) {
  return reduce(v, [](int32_t a, int32_t b) { return a + b; });
}

inline __m256i narrow_to_i16(I32x16 v) {
  const __m256i packed = _mm256_packs_epi32(load<__m256i>(&v), load<__m256i>((const char*)&v + 32));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

inline void store_narrow(int16_t* to, I32x16 v) { store(to, narrow_to_i16(v)); }

// Stores sixteen lanes that fit into int8.
inline void store_narrow(int8_t* to, I32x16 v) {
  const __m256i words = narrow_to_i16(v);
  store(to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#endif

}  // namespace
}  // namespace precalib
