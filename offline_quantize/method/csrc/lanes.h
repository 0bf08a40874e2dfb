// As many numbers side by side as the processor's registers hold, one per lane.

#pragma once

#include <cmath>
#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Longer vectors than registers would be computed number by number.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats splat(float x) { return Floats{} + x; }

inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

inline Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }

inline Floats or_zero(Floats x) { return x == x ? x : Floats{}; }  // for what is not a number

inline Floats round_to_even(Floats x) {
  for (int l = 0; l < kLanes; ++l) x[l] = std::nearbyint(x[l]);
  return x;
}

inline Floats clamp(Floats x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

// table[index], lane by lane.
inline Ints look_up(const int32_t* table, Ints index) {
#if defined(__AVX512F__)
  return Ints(_mm512_mask_i32gather_epi32(__m512i{}, 0xffff, __m512i(index), table, 4));
#elif defined(__AVX2__)
  return Ints(_mm256_i32gather_epi32(table, __m256i(index), 4));
#else
  Ints found;
  for (int l = 0; l < kLanes; ++l) found[l] = table[index[l]];
  return found;
#endif
}

inline bool any(Ints x) {
  int32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= x[l];
  return bits != 0;
}
