// Decodes packed codes to codebook entries by byte shuffles of 16 entries, for ISAs without the
// permutes of 64 that `ByteTable` uses. An entry of a trellis depends on u[k] ^ u[k-2] and u[k-1]
// only, so five bits find an entry of a codebook of 32. Codes of 3 and 4 bits are nibbles in memory
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

constexpr bool has_nibbles(int bits) { return bits == 3 || bits == 4; }

// The same by nibbles: high bits of the code, then u[k], or with a trellis u[k-1], as the top bit.
template <int kBits, bool kTrellis>
  requires(has_nibbles(kBits))
class LevelTable<kBits, kTrellis> {
 public:
  template <class Value>
  LevelTable(const X86Layout& layout, Value&& value) {
    for (int t = 0; t < kTables; ++t) {
      uint8_t bytes[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int high = i & ((1 << (kBits - 1)) - 1), top = i >> 3 & 1;
        bytes[i] =
            uint8_t(value(layout.codebook[high << 3 | (kTrellis ? t << 2 | top << 1 : top << 2)]));
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

// The last vector of nibbles of a chunk. Codes of 3 bits leave one bit of each nibble unused, bit 2
// of the vectors before: there are the bits of the last two nibbles, in the order 0, 1 and 3.
template <int kBits>
inline Words last_nibbles(const uint8_t* chunk) {
  if constexpr (kBits == 4) return load<Words>(chunk + 3 * kVector);
  const Words unused = all_bytes(0x44);
  const Words low = (load<Words>(chunk) & unused) >> 1 | (load<Words>(chunk + kVector) & unused);
  return low >> 1 | (load<Words>(chunk + 2 * kVector) & unused) << 1;
}

// One part of a group of nibbles: byte 4r+s of vector j of a chunk has steps 2j and 2j+1 of row r
// and segment s in its low and its high half. With a trellis the first nibble of a group, which has
// no u[k-1], has the group's last u. So u[k] and u[k-2] are the top bits of the nibbles around step
// k. Calls use(chunk, step, entries), step a compile-time constant.
template <int kBits, bool kTrellis, class Use>
inline void decode_nibbles(const LevelTable<kBits, kTrellis>& table, const uint8_t* planes,
                           int64_t chunks, int64_t ahead, Use&& use) {
  constexpr int kLast = 3;
  const auto chunk = [&](int64_t c) { return planes + c * kBits * kVector; };
  // A segment goes on in the next, the byte above it in its lane.
  const Unsigneds first = load<Unsigneds>(planes);
  const Words end = (Words)(first >> 8 | first << 24);
  Words before = (Words)((Unsigneds)last_nibbles<kBits>(chunk(chunks - 1)) << 8);
  Words v[kLast + 2];
  v[kLast + 1] = kTrellis ? (Words)(first & ~8u) : (Words)first;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int j = 0; j < kBits; ++j) prefetch_l1(chunk(c) + j * kVector + ahead);
    v[0] = v[kLast + 1];
    v[1] = load<Words>(chunk(c) + kVector);
    v[2] = load<Words>(chunk(c) + 2 * kVector);
    v[kLast] = last_nibbles<kBits>(chunk(c));
    v[kLast + 1] = c + 1 < chunks ? load<Words>(chunk(c + 1)) : end;
    [&]<int... j>(std::integer_sequence<int, j...>) {
      ((use(c, std::integral_constant<int, 2 * j>{},
            table.lookup(v[j] & all_bytes(15), v[j] ^ (j ? v[j - (j > 0)] : before))),
        use(c, std::integral_constant<int, 2 * j + 1>{},
            table.lookup(v[j] >> 4 & all_bytes(15), (v[j] ^ v[j + 1]) << 4))),
       ...);
    }(std::make_integer_sequence<int, 4>{});
    before = v[kLast];
  }
}

// One part of chunk c of a group of `chunks`, see `ChunkPlanes`.
template <int kBits, bool kTrellis>
class ChunkLevels {
  static_assert(!has_nibbles(kBits));

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
      if constexpr (kBits == 2) {  // pairs, of even and of odd steps
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
  if constexpr (has_nibbles(kBits)) {
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
