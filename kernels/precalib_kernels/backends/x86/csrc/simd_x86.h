// SIMD types and operations: vectors of 64 bytes in GCC's vector extension, which splits them where
// registers are narrower, and the few operations that need an intrinsic. All of it has internal
// linkage, so that each ISA has its own copy.
#pragma once

#if defined(__clang__)
#error "the kernels need GCC: clang's code calls an OpenMP runtime other than the one torch loads"
#endif

// GCC 12's -fipa-modref takes some copies of `decode` for functions without effect and drops them.
#pragma GCC optimize("no-ipa-modref")

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernel_table.h"
#include "memory.h"

namespace precalib {
namespace {

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x32 __attribute__((vector_size(64)));
typedef uint8_t U8x64 __attribute__((vector_size(64)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

inline void prefetch_l1(const uint8_t* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

// Bits of a where the mask is set, of b elsewhere.
template <class T>
inline T select(T mask, T a, T b) {
#if defined(__AVX512F__)
  // By name, so that the result takes a's register: GCC takes the mask's and copies it each time.
  return (T)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)mask, 0xe4);
#else
  return (a & mask) | (b & ~mask);
#endif
}

constexpr I32x16 kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline F32x16 to_f32(I32x16 v) { return __builtin_convertvector(v, F32x16); }

#if defined(__AVX512F__)

inline I32x16 load_u8(const void* from) {
  return (I32x16)_mm512_cvtepu8_epi32(load<__m128i>(from));
}

inline I32x16 load_i8(const void* from) {
  return (I32x16)_mm512_cvtepi8_epi32(load<__m128i>(from));
}

inline I32x16 load_u16(const void* from) {
  return (I32x16)_mm512_cvtepu16_epi32(load<__m256i>(from));
}

inline F32x16 load_fp16(const void* from) { return (F32x16)_mm512_cvtph_ps(load<__m256i>(from)); }

inline U16x16 to_fp16(F32x16 v) { return (U16x16)_mm512_cvtps_ph((__m512)v, 0); }

inline U16x16 narrow_to_u16(U32x16 v) { return (U16x16)_mm512_cvtepi32_epi16((__m512i)v); }

inline F32x16 gather(const float* table, I32x16 at) {
  return (F32x16)_mm512_i32gather_ps((__m512i)at, table, 4);
}

// values[at % 16], lane by lane.
inline I32x16 permute16(const float* values, I32x16 at) {
  return (I32x16)_mm512_permutexvar_epi32((__m512i)at, load<__m512i>(values));
}

// sum += *by * v. In assembly, since GCC 12 does not use the broadcasting memory operand.
inline void fma_broadcast(F32x16& sum, const float* by, F32x16 v) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(v), "m"(*by));
}

// Transposes 16 rows of 16 floats, `stride` floats from row to row.
__attribute__((always_inline)) inline void transpose_16x16(const float* from, int64_t stride,
                                                           F32x16* columns) {
  __m512 pairs[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    const __m512 a = load<__m512>(from + i * stride), b = load<__m512>(from + (i + 1) * stride);
    pairs[i] = _mm512_unpacklo_ps(a, b);
    pairs[i + 1] = _mm512_unpackhi_ps(a, b);
  }
  __m512 fours[kLanes];  // [four rows][column % 4], each quarter four columns further
  for (int i = 0; i < kLanes; i += 4)
    for (int half = 0; half < 2; ++half) {
      const __m512d a = (__m512d)pairs[i + half], b = (__m512d)pairs[i + half + 2];
      fours[i + 2 * half] = (__m512)_mm512_unpacklo_pd(a, b);
      fours[i + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
  for (int i = 0; i < 4; ++i) {
    const __m512 even_a = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
    const __m512 odd_a = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xdd);
    const __m512 even_b = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
    const __m512 odd_b = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xdd);
    columns[i] = (F32x16)_mm512_shuffle_f32x4(even_a, even_b, 0x88);
    columns[i + 4] = (F32x16)_mm512_shuffle_f32x4(odd_a, odd_b, 0x88);
    columns[i + 8] = (F32x16)_mm512_shuffle_f32x4(even_a, even_b, 0xdd);
    columns[i + 12] = (F32x16)_mm512_shuffle_f32x4(odd_a, odd_b, 0xdd);
  }
}

#else

// Converts sixteen lanes as two vectors of 256 bits.
template <class Result, class Convert>
inline Result convert_by_256_bits(const void* from, int bytes, Convert&& convert) {
  Result out;
  for (int i = 0; i < 2; ++i) {
    const auto part = convert((const char*)from + i * bytes);
    std::memcpy((char*)&out + i * sizeof part, &part, sizeof part);
  }
  return out;
}

inline I32x16 load_u8(const void* from) {
  return convert_by_256_bits<I32x16>(from, 8, [](const char* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
  });
}

inline I32x16 load_i8(const void* from) {
  return convert_by_256_bits<I32x16>(from, 8, [](const char* at) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at));
  });
}

inline I32x16 load_u16(const void* from) {
  return convert_by_256_bits<I32x16>(
      from, 16, [](const char* at) { return _mm256_cvtepu16_epi32(load<__m128i>(at)); });
}

inline F32x16 load_fp16(const void* from) {
  return convert_by_256_bits<F32x16>(
      from, 16, [](const char* at) { return _mm256_cvtph_ps(load<__m128i>(at)); });
}

inline U16x16 to_fp16(F32x16 v) {
  return convert_by_256_bits<U16x16>(
      &v, 32, [](const char* at) { return _mm256_cvtps_ph(load<__m256>(at), 0); });
}

inline U16x16 narrow_to_u16(U32x16 v) {
  const U32x16 small = v & 0xffff;
  return convert_by_256_bits<U16x16>(&small, 32, [](const char* at) {
    return _mm_packus_epi32(load<__m128i>(at), load<__m128i>(at + 16));
  });
}

inline F32x16 gather(const float* table, I32x16 at) {
  F32x16 out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[at[lane]];
  return out;
}

inline I32x16 permute16(const float* values, I32x16 at) { return (I32x16)gather(values, at & 15); }

#endif

inline F32x16 load_u8_as_f32(const void* from) { return to_f32(load_u8(from)); }

inline F32x16 load_bf16(const void* from) { return (F32x16)(load_u16(from) << 16); }

inline U16x16 to_bf16(F32x16 v) {  // to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return (U16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const U32x16 bits = (U32x16)v;
  const U32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const U32x16 kept = v == v ? rounded : bits | 0x400000;
  return narrow_to_u16(kept >> 16);
#endif
}

inline F32x16 load_floats(const void* from, int64_t at, int64_t type) {
  if (type == kFloat32) return load<F32x16>((const float*)from + at);
  const void* const place = (const uint16_t*)from + at;
  return type == kBfloat16 ? load_bf16(place) : load_fp16(place);
}

// Stores the first `count` of sixteen values. A copy of constant size is a store, not a call.
template <class T>
inline void store_some(T* to, const void* from, int64_t count) {
  if (count == kLanes) std::memcpy(to, from, kLanes * sizeof(T));
  else std::memcpy(to, from, size_t(count) * sizeof(T));
}

// Stores the first `count` of sixteen values in the dtype of the call.
inline void store_floats(void* to, int64_t at, F32x16 v, int64_t count, int64_t type) {
  if (type == kFloat32) {
    store_some((float*)to + at, &v, count);
  } else {
    const U16x16 halves = type == kBfloat16 ? to_bf16(v) : to_fp16(v);
    store_some((uint16_t*)to + at, &halves, count);
  }
}

// A table of 2**kBits int8 values, looked up by 64 indices at once. Bits of an index above kBits
// are ignored.
template <int kBits>
struct ByteTable {
#if defined(__AVX512VBMI__)
  static constexpr int kParts = kBits > 6 ? 2 : 1;
  __m512i part[kParts];

  explicit ByteTable(const int8_t* values) {
    for (int i = 0; i < kParts; ++i) part[i] = _mm512_loadu_si512(values + 64 * i);
  }
  U8x64 lookup(U16x32 index) const {
    if constexpr (kParts == 1) return (U8x64)_mm512_permutexvar_epi8((__m512i)index, part[0]);
    else return (U8x64)_mm512_permutex2var_epi8(part[0], (__m512i)index, part[1]);
  }
#else
  static constexpr int kParts = kBits > 4 ? 1 << (kBits - 4) : 1;
  __m256i part[kParts];

  explicit ByteTable(const int8_t* values) {
    for (int i = 0; i < kParts; ++i)
      part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(values + 16 * i)));
  }
  // The entry in one of the parts [first, first + count): bits above the low four select it.
  template <int kFirst, int kCount>
  __m256i choose(__m256i low, __m256i index) const {
    if constexpr (kCount == 1) {
      return _mm256_shuffle_epi8(part[kFirst], low);
    } else {
      constexpr int kHalf = kCount / 2;
      constexpr int kBit = kHalf == 1 ? 4 : kHalf == 2 ? 5 : 6;
      return _mm256_blendv_epi8(choose<kFirst, kHalf>(low, index),
                                choose<kFirst + kHalf, kHalf>(low, index),
                                _mm256_slli_epi16(index, 7 - kBit));
    }
  }
  U8x64 lookup(U16x32 index) const {
    U8x64 out;
    for (int i = 0; i < 2; ++i) {
      const __m256i half = load<__m256i>((char*)&index + 32 * i);
      const __m256i low = _mm256_and_si256(half, _mm256_set1_epi8(15));
      const __m256i found = choose<0, kParts>(low, half);
      std::memcpy((char*)&out + 32 * i, &found, 32);
    }
    return out;
  }
#endif
};

}  // namespace
}  // namespace precalib
