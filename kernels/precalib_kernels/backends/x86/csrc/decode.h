// Decodes packed codes: bit planes to codebook indices, 16 rows by 4 columns per step; and finds
// the scales and salient weights of a group.
//
// A group of L columns is cut into four segments of L/4; byte 4r+s of a vector belongs to row r and
// segment s, so every 32-bit lane is a row and holds four columns. A chunk is eight steps along all
// segments. Its first plane has the low bits u of the codes, bit i of a byte being step i; the
// other planes hold the high bits. An index is the high bits above u[k], u[k-1], u[k-2], so one
// byte shift of the plane u yields the trellis state; the table of a codebook without trellis has
// equal entries for all states.
#pragma once

#include "simd_lanes.h"

#include "blocks.h"  // below what simd_x86.h tells the compiler

namespace precalib {
namespace {

constexpr uint16_t broadcast_byte(int byte) { return uint16_t(byte << 8 | byte); }

template <int kBy>
inline U16x32 shift_left(U16x32 v) {
  if constexpr (kBy >= 0) return v << kBy;
  else return v >> -kBy;
}

// High bits of the codes of step i, from bit 3 of each byte on; other bits are not cleared.
template <int kBits, int i>
inline U16x32 high_bits(const U16x32* plane) {
  if constexpr (kBits == 2) return shift_left<3 - i>(plane[0]);
  if constexpr (kBits == 3) return shift_left<3 - 2 * (i % 4)>(plane[i / 4]);
  if constexpr (kBits == 4) {
    if constexpr (i < 6) return shift_left<i % 2 ? 0 : 3>(plane[i / 2]);
    // two bits left over in one plane, one in the last
    else return select(U16x32{} + broadcast_byte(0x18), plane[i - 6] >> 3, plane[2] >> (i - 5));
  }
  if constexpr (kBits == 5) return shift_left<i % 2 ? -1 : 3>(plane[i / 2]);
}

// The bit planes of chunk c of a group of `chunks`, in registers.
template <int kBits>
class ChunkPlanes {
 public:
  // Prefetches the planes `ahead` bytes further: hardware prefetchers stop at the end of a page.
  ChunkPlanes(const uint8_t* planes, int64_t chunks, int64_t c, int64_t ahead)
      : low_(load<U16x32>(planes + c * kVector)) {
    for (int p = 0; p < kBits; ++p) prefetch_l1(planes + (c * kBits + p) * kVector + ahead);
    // A segment's state begins with the last bits of the segment before it; the first with zeros.
    const U16x32 before = c ? load<U16x32>(planes + (c - 1) * kVector)
                            : (U16x32)(load<U32x16>(planes + (chunks - 1) * kVector) << 8);
    joined_ = select(U16x32{} + broadcast_byte(0xfc), low_ << 2, before >> 6);
    for (int p = 0; p < kBits - 1; ++p)
      high_[p] = load<U16x32>(planes + (chunks + c * (kBits - 1) + p) * kVector);
  }

  // Calls use(step, index) for steps [kFrom, kTo) of the chunk's eight.
  template <int kFrom = 0, int kTo = 8, class Use>
  void decode(Use&& use) const {
    const U16x32 high_mask = U16x32{} + broadcast_byte(((1 << (kBits - 1)) - 1) << 3);
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (use(std::integral_constant<int, kFrom + i>{},
           select(high_mask, high_bits<kBits, kFrom + i>(high_), state<kFrom + i>())),
       ...);
    }(std::make_integer_sequence<int, kTo - kFrom>{});
  }

 private:
  template <int i>
  U16x32 state() const {
    if constexpr (i < 2) return joined_ >> i;
    else return low_ >> (i - 2);
  }
  U16x32 low_, joined_, high_[kBits - 1];
};

// Calls use(step, index, step % 8) for all steps of a group, the last as a compile-time constant.
template <int kBits, class Use>
inline void decode(const uint8_t* planes, int64_t chunks, int64_t ahead, Use&& use) {
  for (int64_t c = 0; c < chunks; ++c)
    ChunkPlanes<kBits>(planes, chunks, c, ahead).decode([&](auto i, U16x32 index) {
      use(8 * c + i, index, i);
    });
}

// The codebook as a lookup table, each entry plus `by`, which is 0 or 128 (mod 256).
template <int kBits>
inline ByteTable<kBits + 2> codebook_table(const X86Layout& layout, int by) {
  int8_t shifted[128];
  for (int i = 0; i < 128; ++i) shifted[i] = int8_t(layout.codebook[i] ^ by);
  return ByteTable<kBits + 2>(shifted);
}

// Two blocks of one shard, or a shard's last one alone.
struct Pair {
  Block blocks[2];
  int count;
};

inline int64_t count_pairs(const X86Layout& layout) {
  int64_t pairs = 0;
  for (int64_t p = 0; p < layout.shard_count; ++p) pairs += (count_blocks(layout, p) + 1) / 2;
  return pairs;
}

inline Pair find_pair(const X86Layout& layout, const uint8_t* packed, int64_t index) {
  int64_t first = 0;
  for (int64_t shard = 0;; ++shard) {
    const int64_t blocks = count_blocks(layout, shard), pairs = (blocks + 1) / 2;
    if (index >= pairs) {
      index -= pairs;
      first += blocks;
      continue;
    }
    Pair pair;
    pair.count = int(min(2, blocks - 2 * index));
    for (int b = 0; b < pair.count; ++b)
      pair.blocks[b] = find_block(layout, packed, first + 2 * index + b);
    return pair;
  }
}

// Prefetches the metadata (scales, zero points, salient weights) of the same group some blocks on.
inline void prefetch_metadata(const X86Layout& layout, const Group& group, int64_t blocks) {
  const uint8_t* const from = group.scales + blocks * layout.groups * layout.metadata_bytes;
  for (int64_t at = 0; at < layout.metadata_bytes; at += 64) prefetch_l1(from + at);
}

// Scales of the group in rows [first, first + lanes of L), float32.
template <class L = SixteenLanes>
inline typename L::F group_scales(const X86Layout& layout, const Block& block, const Group& group,
                                  int first = 0) {
  using F = typename L::F;
  using I = typename L::I;
  const F factor = load<F>(block.row_values + first);
  if (!layout.log_scales) return factor * L::load_fp16(group.scales + 2 * first);
  const I code = L::load_u8(group.scales + first);
  const I power =
      L::permute16(layout.factors, code) - ((code & 0xf0) << 19);  // minus the power of two
  return factor * (F)(power & (code < 255));
}

// Zero points of the group, float32; zeros with a codebook, which has none.
template <class L = SixteenLanes>
inline typename L::F group_zeros(const X86Layout& layout, const Group& group, int first = 0) {
  using F = typename L::F;
  return layout.uniform ? __builtin_convertvector(L::load_u8(group.zeros + first), F) : F{};
}

// One salient weight of each row.
template <class L>
struct SalientOf {
  typename L::I position;    // 4 * step + segment; `X86Layout.no_position` in an unused slot
  typename L::F value;       // without column scale
  typename L::F base_entry;  // codebook entry of the base weight that it replaces
  typename L::I used;        // 0 or -1
};
using Salient = SalientOf<SixteenLanes>;

template <class L = SixteenLanes>
inline SalientOf<L> find_salient(const X86Layout& layout, const Block& block, const Group& group,
                                 int64_t slot, int first = 0) {
  using F = typename L::F;
  using I = typename L::I;
  const uint8_t* at = group.salient + slot * kLanes * (layout.position_bytes + 2);
  const uint8_t* const positions = at + first * layout.position_bytes;
  SalientOf<L> out;
  out.position = layout.position_bytes == 1 ? L::load_u8(positions) : L::load_u16(positions);
  out.used = out.position < int32_t(layout.group_size);
  at += kLanes * layout.position_bytes + first;
  const I code = L::load_u8(at), base_entry = L::load_i8(at + kLanes);
  const int32_t size = int32_t(layout.salient_mask);  // bits of a code that are not its sign
  const F step = load<F>(block.row_values + kLanes + first);
  const F offset = load<F>(block.row_values + 2 * kLanes + first);
  const I bits = (I)(__builtin_convertvector(code & size, F) * step + offset);
  out.value = (F)(bits ^ (code & ~size) << 24);
  out.base_entry = __builtin_convertvector(base_entry, F);
  return out;
}

}  // namespace
}  // namespace precalib
