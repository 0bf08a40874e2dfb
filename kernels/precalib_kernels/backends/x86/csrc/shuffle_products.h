// How codebook entries are multiplied by x in fixed point on ISAs without VBMI: as words, or as
// bytes. A product policy has these members:
//   Split, kSplits        x in fixed point, see `quantize_activations.h`
//   kBase                 of its splits as digits
//   kVectors              vectors that the entries of a step are spread over
//   kShifted              whether entries are shifted by 128, for which sums start at -128 sum(x)
//   spread(entries, use)  calls use(i, vector i)
//   add(sum, vector, x)   each lane's sum plus its four bytes of entries times the four of x
#pragma once

#include "quantize_activations.h"
#include "shuffle_levels.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Entries as int16 times x in int16. The sum of 512 columns is exact.
template <int kSplitsOfX>
struct WordProduct {
  using Split = int16_t;
  static constexpr int kSplits = kSplitsOfX, kVectors = 2, kBase = 1 << 16;
  static constexpr bool kShifted = true;

  template <class Use>
  static void spread(Words entries, Use&& use) {
    use(std::integral_constant<int, 0>{}, entries & 0xff);  // of columns 0 and 2 of the step
    use(std::integral_constant<int, 1>{}, entries >> 8);    // of columns 1 and 3
  }
  static Ints add(Ints sum, Words entries, Ints x) {
#if defined(__AVXVNNI__)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)entries, (__m256i)x);
#else
    return wrapping_add(sum, multiply_words(entries, (Words)x));
#endif
  }
};

// Entries as bytes times x in int8.
template <int kSplitsOfX>
struct ByteProduct {
  using Split = int8_t;
  static constexpr int kSplits = kSplitsOfX, kVectors = 1, kBase = 1 << 8;
#if defined(__AVXVNNI__)
  static constexpr bool kShifted = true;
  static Ints add(Ints sum, Words entries, Ints x) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)entries, (__m256i)x);
  }
#else
  static constexpr bool kShifted = false;  // see `EntryBytes::narrow`
  static Ints add(Ints sum, Words entries, Ints x) {
    return wrapping_add(sum, multiply_words(multiply_bytes(entries, (Words)x), Words{} + 1));
  }
#endif

  template <class Use>
  static void spread(Words entries, Use&& use) {
    use(std::integral_constant<int, 0>{}, entries);
  }
};

// Codebook entries as unsigned bytes: entry = stride * byte + offset.
struct EntryBytes {
  int stride = 1, offset = -128;

  // Bytes of at most seven bits, whose products do not saturate the sums of VPMADDUBSW. Entries of
  // the recipes are odd, so that their stride is 2. Without an answer, stride is 0.
  static EntryBytes narrow(const X86Layout& layout) {
    int lowest = 127, highest = -128, odd = 0;
    for (int entry : layout.codebook) lowest = entry < lowest ? entry : lowest;
    for (int entry : layout.codebook) {
      highest = entry > highest ? entry : highest;
      odd |= (entry - lowest) & 1;
    }
    const int stride = odd ? 1 : 2;
    return {highest - lowest <= 127 * stride ? stride : 0, lowest};
  }
  uint8_t operator()(int entry) const { return uint8_t((entry - offset) / stride); }
};

// Scales and zero points of a group by which its sums of bytes become those of entries.
struct SumScales {
  Floats scale, zero;
};

template <class Product>
inline SumScales sum_scales(const EntryBytes& bytes, Floats scale, Floats zero) {
  if constexpr (Product::kShifted) return {scale, zero};
  return {scale * float(bytes.stride), (zero - float(bytes.offset)) / float(bytes.stride)};
}

// Quantizes a group of a row of x. x: [count] permuted; out: [kSplits][stride].
template <class Product>
inline QuantizedGroup<Product::kSplits> quantize_for(const float* x, int64_t count,
                                                     typename Product::Split* out, int64_t stride,
                                                     float largest) {
  using Split = typename Product::Split;
  const QuantizedGroup<Product::kSplits> group = quantize_group<Product::kSplits, Split>(
      x, count, [&](int d, int64_t k) { return out + d * stride + k; }, largest);
  if constexpr (Product::kVectors == 2)  // columns 0 and 2 of a step before 1 and 3
    for (int d = 0; d < Product::kSplits; ++d)
      for (int64_t k = 0; k < count; k += 16) {
        Split* const at = out + d * stride + k;
        __m256i four = load<__m256i>(at);
        four = _mm256_shufflelo_epi16(four, 0xd8);
        store(at, _mm256_shufflehi_epi16(four, 0xd8));
      }
  return group;
}

}  // namespace
}  // namespace precalib

#endif
