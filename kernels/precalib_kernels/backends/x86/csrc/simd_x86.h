// Vectors of 64 bytes in GCC's own notation, which splits them where registers are narrower, and the
// few operations that need an instruction by name. Everything here is internal to one level's copy.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's analysis of what functions write finds nothing in some copies of `decode`, which it drops.
#pragma GCC optimize("no-ipa-modref")
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "memory_layout.h"

namespace precalib {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(32)));  // sixteen

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Memory of one call or thread.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data((T*)std::aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64)) {
    if (data == nullptr) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// Into the first cache, for soon.
inline void fetch(const uint8_t* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Bits of a where mask is set, of b elsewhere.
template <class T>
inline T select(T mask, T a, T b) {
#if defined(__AVX512F__)
  // Into a's register: GCC takes the mask's, and copies that one each time.
  return (T)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)mask, 0xe4);
#else
  return (a & mask) | (b & ~mask);
#endif
}

constexpr Ints kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

#if defined(__AVX512F__)

inline Ints ints_of_bytes(const void* from) {
  return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from));
}

inline Ints ints_of_signed_bytes(const void* from) {
  return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(from));
}

inline Ints ints_of_halves(const void* from) {
  return (Ints)_mm512_cvtepu16_epi32(load<__m256i>(from));
}

inline Floats floats_of_halves(const void* from) {
  return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
}

inline Halves to_halves(Floats v) { return (Halves)_mm512_cvtps_ph((__m512)v, 0); }

inline Halves low_halves(Words v) { return (Halves)_mm512_cvtepi32_epi16((__m512i)v); }

inline Floats look_up(const float* table, Ints at) {
  return (Floats)_mm512_i32gather_ps((__m512i)at, table, 4);
}

// Of sixteen values, by the low four bits of each index.
inline Ints among(const float* values, Ints at) {
  return (Ints)_mm512_permutexvar_epi32((__m512i)at, load<__m512i>(values));
}

// sum += *by * v. By name, as GCC 12 loads the one into a register of its own.
inline void add_product(Floats& sum, const float* by, Floats v) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(v), "m"(*by));
}

// The columns of a square of sixteen rows, each `stride` floats after the one before.
__attribute__((always_inline)) inline void turn(const float* from, int64_t stride,
                                                Floats* columns) {
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
    columns[i] = (Floats)_mm512_shuffle_f32x4(even_a, even_b, 0x88);
    columns[i + 4] = (Floats)_mm512_shuffle_f32x4(odd_a, odd_b, 0x88);
    columns[i + 8] = (Floats)_mm512_shuffle_f32x4(even_a, even_b, 0xdd);
    columns[i + 12] = (Floats)_mm512_shuffle_f32x4(odd_a, odd_b, 0xdd);
  }
}

#else

// Both halves of sixteen lanes, each converted by itself.
template <class Result, class Convert>
inline Result by_halves(const void* from, int bytes, Convert&& convert) {
  Result out;
  for (int i = 0; i < 2; ++i) {
    const auto part = convert((const char*)from + i * bytes);
    std::memcpy((char*)&out + i * sizeof part, &part, sizeof part);
  }
  return out;
}

inline Ints ints_of_bytes(const void* from) {
  return by_halves<Ints>(from, 8, [](const char* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
  });
}

inline Ints ints_of_signed_bytes(const void* from) {
  return by_halves<Ints>(from, 8, [](const char* at) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at));
  });
}

inline Ints ints_of_halves(const void* from) {
  return by_halves<Ints>(from, 16, [](const char* at) {
    return _mm256_cvtepu16_epi32(load<__m128i>(at));
  });
}

inline Floats floats_of_halves(const void* from) {
  return by_halves<Floats>(from, 16, [](const char* at) {
    return _mm256_cvtph_ps(load<__m128i>(at));
  });
}

inline Halves to_halves(Floats v) {
  return by_halves<Halves>(&v, 32, [](const char* at) {
    return _mm256_cvtps_ph(load<__m256>(at), 0);
  });
}

inline Halves low_halves(Words v) {
  const Words small = v & 0xffff;
  return by_halves<Halves>(&small, 32, [](const char* at) {
    return _mm_packus_epi32(load<__m128i>(at), load<__m128i>(at + 16));
  });
}

inline Floats look_up(const float* table, Ints at) {
  Floats out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[at[lane]];
  return out;
}

inline Ints among(const float* values, Ints at) { return (Ints)look_up(values, at & 15); }

#endif

inline Floats floats_of_bytes(const void* from) { return to_floats(ints_of_bytes(from)); }

inline Floats floats_of_bfloats(const void* from) { return (Floats)(ints_of_halves(from) << 16); }

inline Halves to_bfloats(Floats v) {  // to nearest even; not-a-number stays one
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Words kept = v == v ? rounded : bits | 0x400000;
  return low_halves(kept >> 16);
#endif
}

inline Floats load_floats(const void* from, int64_t at, int64_t type) {
  if (type == kFloat32) return load<Floats>((const float*)from + at);
  const void* const place = (const uint16_t*)from + at;
  return type == kBfloat16 ? floats_of_bfloats(place) : floats_of_halves(place);
}

// The first `count` of sixteen values. Copies of a size known beforehand are stores, not calls.
template <class T>
inline void store_some(T* to, const void* from, int64_t count) {
  if (count == kLanes) std::memcpy(to, from, kLanes * sizeof(T));
  else std::memcpy(to, from, size_t(count) * sizeof(T));
}

// The same in the type of the call.
inline void store_floats(void* to, int64_t at, Floats v, int64_t count, int64_t type) {
  if (type == kFloat32) {
    store_some((float*)to + at, &v, count);
  } else {
    const Halves halves = type == kBfloat16 ? to_bfloats(v) : to_halves(v);
    store_some((uint16_t*)to + at, &halves, count);
  }
}

// A table of int8 by index, for 64 indices at once. Of an index only as many bits count as the
// table is long; those above may be anything.
template <int kBits>  // of an index
struct Table {
#if defined(__AVX512VBMI__)
  static constexpr int kParts = kBits > 6 ? 2 : 1;
  __m512i part[kParts];

  explicit Table(const int8_t* values) {
    for (int i = 0; i < kParts; ++i) part[i] = _mm512_loadu_si512(values + 64 * i);
  }
  Bytes find(Shorts index) const {
    if constexpr (kParts == 1) return (Bytes)_mm512_permutexvar_epi8((__m512i)index, part[0]);
    else return (Bytes)_mm512_permutex2var_epi8(part[0], (__m512i)index, part[1]);
  }
#else
  static constexpr int kParts = kBits > 4 ? 1 << (kBits - 4) : 1;
  __m256i part[kParts];

  explicit Table(const int8_t* values) {
    for (int i = 0; i < kParts; ++i)
      part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(values + 16 * i)));
  }
  // Entry of the parts [first, first + count): bits above the low four choose, highest first.
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
  Bytes find(Shorts index) const {
    Bytes out;
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
