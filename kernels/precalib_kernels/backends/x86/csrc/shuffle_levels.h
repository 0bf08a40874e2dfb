// Decodes packed codes to codebook entries by byte shuffles of 16 entries, for ISAs without the
// permutes of 64 that `ByteTable` uses. An entry of a trellis depends on u[k] ^ u[k-2] and u[k-1]
// only, so five bits find an entry of a codebook of 32. Codes of 4 bits are nibbles in memory
// (`decode_nibbles`), others bit planes (`ChunkLevels`).
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

// The same for nibbles: without a trellis a nibble is the code; with one, its high bits below u[k-1].
template <bool kTrellis>
class LevelTable<4, kTrellis> {
 public:
  template <class Value>
  LevelTable(const X86Layout& layout, Value&& value) {
    for (int t = 0; t < kTables; ++t) {
      uint8_t bytes[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int nibble = i % 16;
        const int index = kTrellis ? (nibble & 7) << 3 | t << 2 | nibble >> 3 << 1 : nibble << 2;
        bytes[i] = uint8_t(value(layout.codebook[index]));
      }
      table_[t] = load<Words>(bytes);
    }
  }

  // nibbles: in the low bits of bytes, others zero; flags: u[k] ^ u[k-2] as the top bit.
  Words lookup(Words nibbles, Words flags) const {
    const Words entries = shuffle_bytes(table_[0], nibbles);
    if constexpr (!kTrellis) return entries;
    else return choose_bytes(flags, shuffle_bytes(table_[1], nibbles), entries);
  }

 private:
  static constexpr int kTables = kTrellis ? 2 : 1;
  Words table_[kTables];
};

// One part of a group of nibbles: byte 4r+s of vector j of a chunk has steps 2j and 2j+1 of row r and
// segment s in its low and its high half. The top bit of a trellis' nibble is u[k-1], and that of a
// group's first step the last u. So u[k] and u[k-2] are the top bits of the nibbles around step k.
// Calls use(chunk, step, entries), step a compile-time constant.
template <bool kTrellis, class Use>
inline void decode_nibbles(const LevelTable<4, kTrellis>& table, const uint8_t* planes,
                           int64_t chunks, int64_t ahead, Use&& use) {
  constexpr int kVectors = 4;
  const Words first = load<Words>(planes);
  // A segment goes on in the next, the byte above it in its lane.
  const Words end = (Words)((Unsigneds)first >> 8 | (Unsigneds)first << 24);
  Words before = (Words)(load<Unsigneds>(planes + (kVectors * chunks - 1) * kVector) << 8);
  Words v[kVectors + 1];
  v[kVectors] = kTrellis ? (Words)((Unsigneds)first & ~8u) : first;
  for (int64_t c = 0; c < chunks; ++c) {
    const uint8_t* const at = planes + c * kVectors * kVector;
    v[0] = v[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      prefetch_l1(at + j * kVector + ahead);
      if (j) v[j] = load<Words>(at + j * kVector);
    }
    v[kVectors] = c + 1 < chunks ? load<Words>(at + kVectors * kVector) : end;
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (use(c, std::integral_constant<int, i>{},
           table.lookup((i % 2 ? v[i / 2] >> 4 : v[i / 2]) & all_bytes(15),
                        i % 2 ? (v[i / 2] ^ v[i / 2 + 1]) << 4
                              : v[i / 2] ^ (i ? v[i / 2 - (i > 0)] : before))),
       ...);
    }(std::make_integer_sequence<int, 8>{});
    before = v[kVectors - 1];
  }
}

// One part of chunk c of a group of `chunks`, see `ChunkPlanes`.
template <int kBits, bool kTrellis>
class ChunkLevels {
  static_assert(kBits != 4);

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
  static constexpr int kFlags = kBits == 5 ? 0x80 : kTrellis ? 3 << kHigh : 1 << kHigh;

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
    if constexpr (kBits == 5) return shift<i % 2 ? -4 : 0>(high_[i / 2]);
  }

  template <int i>
  Words flags() const {
    if constexpr (kBits == 5) return shift<7 - i>(flags_[0]);
    else if constexpr (!kTrellis) return shift<kHigh - i>(flags_[0]);
    else return shift<kHigh - i / 2 * 2>(flags_[i % 2]);
  }

  template <int i>
  Words sixth() const {
    if constexpr (kBits == 5 && kTrellis) return shift<7 - i>(flags_[1]);
    else return Words{};
  }

  Words high_[kHigh], flags_[kTrellis ? 2 : 1];
};

// Calls use(chunk, step, entries) for one part of a group, step a compile-time constant.
template <int kBits, bool kTrellis, class Use>
inline void decode_entries(const LevelTable<kBits, kTrellis>& table, const uint8_t* planes,
                           int64_t chunks, int64_t ahead, Use&& use) {
  if constexpr (kBits == 4) {
    decode_nibbles(table, planes, chunks, ahead, use);
  } else {
    for (int64_t c = 0; c < chunks; ++c)
      ChunkLevels<kBits, kTrellis>(planes, chunks, c, ahead)
          .decode(table, [&](auto i, Words entries) { use(c, i, entries); });
  }
}

}  // namespace
}  // namespace precalib

#endif
