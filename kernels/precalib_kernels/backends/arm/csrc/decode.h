// Decodes packed codes: bit planes to codebook entries, four rows by four columns per step.
//
// The layout is that of backend x86 (`backends/x86/memory_layout.py`): a vector of 64 bytes has a
// 32-bit lane for each row of a block, so each quarter of it, a NEON vector, has four rows. What
// differs is where the high bits of a step lie in their planes (`memory_layout.py`).
//
// With a trellis an entry depends on the high bits of the code and on a pair of bits
// (u[k] ^ u[k-2], u[k-1]), u being the low bits of the codes. Without one the pair is (u[k], any),
// and the table has equal entries for both values of the second bit.
#pragma once

#include "simd_neon.h"

namespace precalib {
namespace {

// The codebook entry of some high bits and a pair.
inline int8_t entry_of(const PackedLayout& layout, int high, int pair) {
  return layout.codebook[high << 3 | pair << 1];  // u[k], u[k-1], and u[k-2] = 0
}

// Makes a table of `kSize` entries. high(index), pair(index): what an index is made of.
template <int kSize, class High, class Pair>
inline ByteTable<kSize> make_table(const PackedLayout& layout, High&& high, Pair&& pair) {
  int8_t values[kSize];
  for (int i = 0; i < kSize; ++i) values[i] = entry_of(layout, high(i), pair(i));
  return ByteTable<kSize>(values);
}

constexpr auto kAbove2 = [](int i) { return i >> 2; };
constexpr auto kLow2 = [](int i) { return i & 3; };

// The codebook as tables. Indices are the high bits above the pair; in `second` tables of 2 and 3
// bits they are the pair above two high bits. With 2 bits one of two bits counts: the upper one in
// even steps, the lower one in odd steps.
template <int kBits>
struct Codebook {
  ByteTable<kBits == 5 ? 64 : 32> table;
  explicit Codebook(const PackedLayout& layout)
      : table(make_table<kBits == 5 ? 64 : 32>(layout, kAbove2, kLow2)) {}
};
template <>
struct Codebook<3> {
  ByteTable<16> first, second;
  explicit Codebook(const PackedLayout& layout)
      : first(make_table<16>(layout, kAbove2, kLow2)),
        second(make_table<16>(layout, kLow2, kAbove2)) {}
};
template <>
struct Codebook<2> {
  ByteTable<16> first[2], second[2];  // of even and odd steps
  explicit Codebook(const PackedLayout& layout)
      : first{make_table<16>(
                  layout, [](int i) { return i >> 3; }, kLow2),
              make_table<16>(
                  layout, [](int i) { return i >> 2 & 1; }, kLow2)},
        second{make_table<16>(
                   layout, [](int i) { return i >> 1 & 1; }, kAbove2),
               make_table<16>(layout, [](int i) { return i & 1; }, kAbove2)} {}
};

// The pairs of the eight steps of a chunk.
template <bool kTrellis>
struct Pairs {
  U8x16 low, before, changed;  // changed: u[k] ^ u[k-2] at bit k

  // low: the plane of low bits; before: that of the chunk before.
  Pairs(U8x16 low, U8x16 before) : low(low), before(before), changed(low) {
    if constexpr (kTrellis) changed = low ^ insert_above<2>(shift_right<6>(before), low);
  }
  // The pair of step k at bits k - 1 and k, for odd k.
  U8x16 odd() const { return kTrellis ? select(all_bytes(0xaa), changed, low) : low; }
  // The same for even k, but for the first.
  U8x16 even() const { return kTrellis ? select(all_bytes(0xaa), low, changed) : low; }
  // The pair of step 0 at bits 0 and 1; bits above them mean nothing.
  U8x16 first() const {
    return kTrellis ? insert_above<1>(shift_right<7>(before), changed) : shift_left<1>(low);
  }
  // The pair of step k at bits k and k + 1, for even k.
  U8x16 even_from_zero() const {
    if constexpr (!kTrellis) return shift_left<1>(low);
    const U8x16 one_back = insert_above<1>(shift_right<7>(before), low);
    return select(all_bytes(0xaa), shift_left<1>(changed), one_back);
  }
};

// What follows is always inlined: GCC else calls it, entries go through memory, and that doubles the
// instructions.

// Entries of the eight steps, with 2 and 3 bits: pairs and high bits, both two bits wide, become
// nibbles. even, odd: planes of the high bits of even and odd steps.
template <int kBits, bool kTrellis>
[[gnu::always_inline]] inline void decode_nibbles(const Codebook<kBits>& codebook,
                                                  const Pairs<kTrellis>& pairs, U8x16 even,
                                                  U8x16 odd, I8x16* entries) {
  const auto look_up = [&](U8x16 pair, U8x16 high, int parity) {
    const U8x16 mask = all_bytes(0x33);
    const U8x16 first = select(mask, pair, high), second = select(mask, high, pair);
    const auto table = [&](const auto& of) {
      if constexpr (kBits == 2) return of[parity];
      else return of;
    };
    entries[parity] = table(codebook.first).lookup(first & all_bytes(15));
    entries[parity + 2] = table(codebook.second).lookup(second & all_bytes(15));
    entries[parity + 4] = table(codebook.first).lookup(shift_right<4>(first));
    entries[parity + 6] = table(codebook.second).lookup(shift_right<4>(second));
  };
  look_up(pairs.even_from_zero(), even, 0);
  look_up(pairs.odd(), odd, 1);
}

// Entries of steps k and k + 1, with 4 and 5 bits, whose high bits share a plane: those of the even
// step lie at the top.
template <int kBits, int k, bool kTrellis>
[[gnu::always_inline]] inline void decode_two(const Codebook<kBits>& codebook,
                                              const Pairs<kTrellis>& pairs, U8x16 plane,
                                              I8x16* entries) {
  U8x16 pair;
  if constexpr (k == 0) pair = pairs.first();
  else pair = shift_right<k - 1>(pairs.even());
  const U8x16 next = shift_right<k>(pairs.odd());
  const U8x16 index = insert_above<2>(pair, shift_right<9 - kBits>(plane));
  entries[k] = codebook.table.lookup(index);
  if constexpr (kBits == 4)
    entries[k + 1] = codebook.table.lookup(select(all_bytes(3), next, plane & all_bytes(0x1c)));
  else entries[k + 1] = codebook.table.lookup(insert_above<2>(next, plane & all_bytes(15)));
}

// Entries of the eight steps of chunk c. planes: of a group of `chunks`, at the part's four rows;
// before: low bits of the chunk before.
template <int kBits, bool kTrellis>
[[gnu::always_inline]] inline void decode_chunk(const Codebook<kBits>& codebook,
                                                const uint8_t* planes, int64_t chunks, int64_t c,
                                                U8x16 before, I8x16* entries) {
  const U8x16 low = load<U8x16>(planes + c * kVector);
  const Pairs<kTrellis> pairs(low, before);
  U8x16 high[kBits - 1];
  for (int p = 0; p < kBits - 1; ++p)
    high[p] = load<U8x16>(planes + (chunks + c * (kBits - 1) + p) * kVector);
  if constexpr (kBits <= 3) {
    decode_nibbles<kBits>(codebook, pairs, high[0], high[kBits - 2], entries);
  } else {
    decode_two<kBits, 0>(codebook, pairs, high[0], entries);
    decode_two<kBits, 2>(codebook, pairs, high[1], entries);
    decode_two<kBits, 4>(codebook, pairs, high[2], entries);
    if constexpr (kBits == 4) {  // two bits left over in each plane make the last one
      const U8x16 last = insert_above<6>(insert_above<4>(shift_left<2>(high[0]), high[1]), high[2]);
      decode_two<kBits, 6>(codebook, pairs, last, entries);
    } else {
      decode_two<kBits, 6>(codebook, pairs, high[3], entries);
    }
  }
}

// The plane of low bits before that of a chunk, which is in memory but for the first chunk: there
// each segment begins where the one before it ends.
class PlaneBefore {
 public:
  PlaneBefore(const uint8_t* planes, int64_t chunks) {
    for (int at = 0; at < kVector; at += 16)
      store(first_ + at, next_byte(load<U8x16>(planes + (chunks - 1) * kVector + at)));
  }
  void next(const uint8_t* low) { plane_ = low; }
  U8x16 part(int p) const { return load<U8x16>(plane_ + 16 * p); }

 private:
  alignas(16) uint8_t first_[kVector];
  const uint8_t* plane_ = first_;
};

}  // namespace
}  // namespace precalib
