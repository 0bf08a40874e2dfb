// Decodes packed codes to codebook entries by byte shuffles of 16 entries, for ISAs without the
// permutes of 64 that `ByteTable` uses. An entry of a trellis depends on u[k] ^ u[k-2] and u[k-1]
// only, so five bits find an entry of a codebook of 32. A shuffle yields zero where the top bit of
// its index is set, so two tables take two shuffles and no blend.
#pragma once

#include "decode.h"
#include "shuffle_vectors.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Codebook entries plus `by` (0 or 128, mod 256) by index: high bits of the code, then u[k]; with a
// trellis the high bits, then u[k-1], then u[k] ^ u[k-2].
template <int kBits, bool kTrellis>
class LevelTable {
 public:
  static constexpr int kIndexBits = kBits + kTrellis;
  static constexpr int kTables = kIndexBits > 4 ? 1 << (kIndexBits - 4) : 1;

  // value(entry): the byte to look up.
  template <class Value>
  LevelTable(const X86Layout& layout, Value&& value) {
    constexpr int kHigh = kBits - 1;
    for (int t = 0; t < kTables; ++t) {
      uint8_t bytes[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int index = (t << 4 | i % 16) & ((1 << kIndexBits) - 1);
        const int high = index & ((1 << kHigh) - 1), flags = index >> kHigh;
        const int state = kTrellis ? (flags & 1) << 1 | (flags >> 1) << 2 : flags << 2;
        bytes[i] = uint8_t(value(layout.codebook[high << 3 | state]));
      }
      table_[t] = load<Words>(bytes);
    }
  }

  // index: bits below the fourth, and the fifth as the top bit; sixth: as the top bit.
  Words lookup(Words index, Words sixth) const {
    if constexpr (kTables == 1) {
      return shuffle_bytes(table_[0], index);
    } else {
      const Words other = index ^ all_bytes(0x80);
      const Words low = shuffle_bytes(table_[0], index) | shuffle_bytes(table_[1], other);
      if constexpr (kTables == 2) return low;
      else
        return choose_bytes(sixth,
                            shuffle_bytes(table_[2], index) | shuffle_bytes(table_[3], other), low);
    }
  }

 private:
  Words table_[kTables];
};

// One part of chunk c of a group of `chunks`, see `ChunkPlanes`.
template <int kBits, bool kTrellis>
class ChunkLevels {
 public:
  // planes: of the group, at the part's rows.
  ChunkLevels(const uint8_t* planes, int64_t chunks, int64_t c, int64_t ahead) {
    for (int p = 0; p < kBits; ++p) prefetch_l1(planes + (c * kBits + p) * kVector + ahead);
    const Words low = load<Words>(planes + c * kVector);
    for (int p = 0; p < kHigh; ++p)
      high_[p] = load<Words>(planes + (chunks + c * kHigh + p) * kVector);
    if constexpr (!kTrellis) {
      flags_[0] = low;
    } else {
      const Words before = c ? load<Words>(planes + (c - 1) * kVector)
                             : (Words)(load<Ints>(planes + (chunks - 1) * kVector) << 8);
      const Words one = select(all_bytes(0xfe), low << 1, before >> 7);
      const Words odd = low ^ select(all_bytes(0xfc), low << 2, before >> 6);
      if constexpr (kBits < 4) {  // pairs, of even and of odd steps
        flags_[0] = select(all_bytes(0x55), one, odd << 1);
        flags_[1] = select(all_bytes(0x55), one >> 1, odd);
      } else if constexpr (kBits == 4) {  // four bits apart, of the first and the last steps
        flags_[0] = select(all_bytes(0xf0), odd << 4, one);
        flags_[1] = select(all_bytes(0xf0), odd, one >> 4);
      } else {
        flags_[0] = one;
        flags_[1] = odd;
      }
    }
  }

  // Calls use(step, entries) for the chunk's eight steps.
  template <class Use>
  void decode(const LevelTable<kBits, kTrellis>& table, Use&& use) const {
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (use(std::integral_constant<int, i>{},
           table.lookup(merge(high<i>(), flags<i>()), sixth<i>())),
       ...);
    }(std::make_integer_sequence<int, 8>{});
  }

 private:
  static constexpr int kHigh = kBits - 1;
  // Bits of an index that `flags` has; those that neither has may be anything below the top bit.
  static constexpr int kFlags = kBits == 5   ? 0x80
                                : !kTrellis  ? 1 << kHigh
                                : kBits == 4 ? 0x88
                                             : 3 << kHigh;

  static Words merge(Words high, Words flags) {
    return (high & all_bytes((1 << kHigh) - 1)) | (flags & all_bytes(kFlags));
  }

  template <int kBy>
  static Words shift(Words v) {
    if constexpr (kBy > 0) return v << kBy;
    else if constexpr (kBy < 0) return v >> -kBy;
    else return v;
  }

  // High bits of the code of step i, from bit 0 of each byte on.
  template <int i>
  Words high() const {
    if constexpr (kBits == 2) return shift<-i>(high_[0]);
    if constexpr (kBits == 3) return shift<-2 * (i % 4)>(high_[i / 4]);
    if constexpr (kBits == 4 && i < 6) return shift<i % 2 ? -3 : 0>(high_[i / 2]);
    if constexpr (kBits == 4 && i >= 6)
      return select(all_bytes(3), high_[i - 6] >> 6, high_[2] >> (i - 2));
    if constexpr (kBits == 5) return shift<i % 2 ? -4 : 0>(high_[i / 2]);
  }

  template <int i>
  Words flags() const {
    if constexpr (kBits == 5) return shift<7 - i>(flags_[0]);
    else if constexpr (!kTrellis) return shift<kHigh - i>(flags_[0]);
    else if constexpr (kBits == 4) return shift<3 - i % 4>(flags_[i / 4]);
    else return shift<kHigh - i / 2 * 2>(flags_[i % 2]);
  }

  template <int i>
  Words sixth() const {
    if constexpr (kBits == 5 && kTrellis) return shift<7 - i>(flags_[1]);
    else return Words{};
  }

  Words high_[kHigh], flags_[kTrellis ? 2 : 1];
};

}  // namespace
}  // namespace precalib

#endif
