// From bit planes to levels: 16 rows by 4 columns of them per step.
//
// A group of L columns is cut into four segments of L/4; byte 4r+s of a vector belongs to row r and
// segment s, so every 32-bit lane is a row and holds four columns. A chunk is eight steps along all
// segments. Its first plane has the low bits u of the codes, bit i of a byte being step i; the other
// planes hold the high bits. An index is the high bits above u[k], u[k-1], u[k-2], so one byte
// shift of the plane u yields the trellis' state, and a table without trellis just ignores it.
#pragma once

#include "simd_x86.h"

namespace precalib {
namespace {

constexpr uint16_t both(int byte) { return uint16_t(byte << 8 | byte); }

template <int kBy>
inline Shorts shift_left(Shorts v) {
  if constexpr (kBy >= 0) return v << kBy;
  else return v >> -kBy;
}

// High bits of step i's codes, from bit 3 on; what lies around them is not cleared.
template <int kBits, int i>
inline Shorts high_bits(const Shorts* plane) {
  if constexpr (kBits == 2) return shift_left<3 - i>(plane[0]);
  if constexpr (kBits == 3) return shift_left<3 - 2 * (i % 4)>(plane[i / 4]);
  if constexpr (kBits == 4) {
    if constexpr (i < 6) return shift_left<i % 2 ? 0 : 3>(plane[i / 2]);
    // two left-over bits of one plane, one of the last
    else return select(Shorts{} + both(0x18), plane[i - 6] >> 3, plane[2] >> (i - 5));
  }
  if constexpr (kBits == 5) return shift_left<i % 2 ? -1 : 3>(plane[i / 2]);
}

// The planes of chunk c of a group's `chunks`.
template <int kBits>
class ChunkPlanes {
 public:
  // What lies `ahead` bytes further is fetched meanwhile: processors do so within a page only.
  ChunkPlanes(const uint8_t* planes, int64_t chunks, int64_t c, int64_t ahead)
      : low_(load<Shorts>(planes + c * kVector)) {
    for (int p = 0; p < kBits; ++p) fetch(planes + (c * kBits + p) * kVector + ahead);
    // What precedes a segment is the end of the one before it; zeros precede the first.
    const Shorts before = c ? load<Shorts>(planes + (c - 1) * kVector)
                            : (Shorts)(load<Words>(planes + (chunks - 1) * kVector) << 8);
    joined_ = select(Shorts{} + both(0xfc), low_ << 2, before >> 6);
    for (int p = 0; p < kBits - 1; ++p)
      high_[p] = load<Shorts>(planes + (chunks + c * (kBits - 1) + p) * kVector);
  }

  // use(which, index) for steps [kFrom, kTo) of its eight.
  template <int kFrom = 0, int kTo = 8, class Use>
  void decode(Use&& use) const {
    const Shorts high_mask = Shorts{} + both(((1 << (kBits - 1)) - 1) << 3);
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (use(std::integral_constant<int, kFrom + i>{},
           select(high_mask, high_bits<kBits, kFrom + i>(high_), state<kFrom + i>())),
       ...);
    }(std::make_integer_sequence<int, kTo - kFrom>{});
  }

 private:
  template <int i>
  Shorts state() const {
    if constexpr (i < 2) return joined_ >> i;
    else return low_ >> (i - 2);
  }
  Shorts low_, joined_, high_[kBits - 1];
};

// use(step, index, which of its chunk's eight steps) for all steps of a group.
template <int kBits, class Use>
inline void decode(const uint8_t* planes, int64_t chunks, int64_t ahead, Use&& use) {
  for (int64_t c = 0; c < chunks; ++c)
    ChunkPlanes<kBits>(planes, chunks, c, ahead).decode([&](auto i, Shorts index) {
      use(8 * c + i, index, i);
    });
}

// Levels plus `by`, 0 or 128, as unsigned bytes.
template <int kBits>
inline Table<kBits + 2> shifted_levels(const Plan& plan, int by) {
  int8_t shifted[128];
  for (int i = 0; i < 128; ++i) shifted[i] = int8_t(plan.levels[i] ^ by);
  return Table<kBits + 2>(shifted);
}

// Where a block of rows is and what belongs to it.
struct Block {
  const uint8_t* planes;
  const uint8_t* side;
  const float* row_values;  // [3][16]: factor of the scales; salient step and offset
  int64_t part, first_row, rows;  // rows: at most 16
};

inline int64_t count_blocks(const Plan& plan, int64_t part) {
  return (plan.part_rows[part] + kLanes - 1) / kLanes;
}

inline int64_t count_blocks(const Plan& plan) {
  int64_t blocks = 0;
  for (int64_t p = 0; p < plan.part_count; ++p) blocks += count_blocks(plan, p);
  return blocks;
}

inline Block find_block(const Plan& plan, const uint8_t* packed, int64_t index) {
  Block block;
  block.planes = packed + index * plan.block_bytes;
  block.side = packed + plan.side_offset + index * plan.groups * plan.side_bytes;
  block.row_values = (const float*)(packed + plan.row_offset) + index * 3 * kLanes;
  int64_t row = 0, part = 0, local = index;
  for (;; ++part) {
    const int64_t blocks = count_blocks(plan, part);
    if (local < blocks) break;
    local -= blocks;
    row += plan.part_rows[part];
  }
  block.part = part;
  block.first_row = row + local * kLanes;
  block.rows = smaller(kLanes, plan.part_rows[part] - local * kLanes);
  return block;
}

// Two blocks of one part, or a part's last one alone.
struct Pair {
  Block blocks[2];
  int count;
};

inline int64_t count_pairs(const Plan& plan) {
  int64_t pairs = 0;
  for (int64_t p = 0; p < plan.part_count; ++p) pairs += (count_blocks(plan, p) + 1) / 2;
  return pairs;
}

inline Pair find_pair(const Plan& plan, const uint8_t* packed, int64_t index) {
  int64_t first = 0;
  for (int64_t part = 0;; ++part) {
    const int64_t blocks = count_blocks(plan, part), pairs = (blocks + 1) / 2;
    if (index >= pairs) {
      index -= pairs;
      first += blocks;
      continue;
    }
    Pair pair;
    pair.count = int(smaller(2, blocks - 2 * index));
    for (int b = 0; b < pair.count; ++b)
      pair.blocks[b] = find_block(plan, packed, first + 2 * index + b);
    return pair;
  }
}

// One group of a block: columns, scale and zero point by row, salient weights.
struct Group {
  int64_t first, columns, chunks;
  const uint8_t* planes;
  const uint8_t* scales;
  const uint8_t* zeros;
  const uint8_t* salient;  // per slot: positions [16], codes [16], base levels [16]
};

inline Group find_group(const Plan& plan, const Block& block, int64_t index) {
  Group group;
  group.first = index * plan.group_size;
  group.columns = smaller(plan.group_size, plan.columns - group.first);
  group.chunks = group.columns / kChunk;
  group.planes = block.planes + group.first / kChunk * plan.bits * kVector;
  group.scales = block.side + index * plan.side_bytes;
  group.zeros = group.scales + kLanes * (plan.log_scales ? 1 : 2);
  group.salient = group.zeros + (plan.uniform ? kLanes : 0);
  return group;
}

// Scales and salient weights of the same group some blocks further.
inline void fetch_side(const Plan& plan, const Group& group, int64_t blocks) {
  const uint8_t* const from = group.scales + blocks * plan.groups * plan.side_bytes;
  for (int64_t at = 0; at < plan.side_bytes; at += 64) fetch(from + at);
}

// Scales of the group, float32.
inline Floats group_scales(const Plan& plan, const Block& block, const Group& group) {
  const Floats factor = load<Floats>(block.row_values);
  if (!plan.log_scales) return factor * floats_of_halves(group.scales);
  const Ints code = ints_of_bytes(group.scales);
  const Ints power = among(plan.factors, code) - ((code & 0xf0) << 19);  // of 2, down
  return factor * (Floats)(power & (code < 255));
}

// Zero points of the group, float32; zeros where levels have none.
inline Floats group_zeros(const Plan& plan, const Group& group) {
  return plan.uniform ? floats_of_bytes(group.zeros) : Floats{};
}

// One salient weight of each row.
struct Salient {
  Ints position;  // 4 * step + segment; `Plan.no_position` if not used
  Floats value;   // without column scale
  Floats level;   // of the base weight in its place
  Ints used;      // 0 or -1
};

inline Salient find_salient(const Plan& plan, const Block& block, const Group& group,
                            int64_t slot) {
  const uint8_t* at = group.salient + slot * kLanes * (plan.position_bytes + 2);
  Salient out;
  out.position = plan.position_bytes == 1 ? ints_of_bytes(at) : ints_of_halves(at);
  out.used = out.position < int32_t(plan.group_size);
  at += kLanes * plan.position_bytes;
  const Ints code = ints_of_bytes(at), level = ints_of_signed_bytes(at + kLanes);
  const int32_t size = int32_t(plan.salient_mask);  // bits of a code that are not its sign
  const Floats step = load<Floats>(block.row_values + kLanes);
  const Floats offset = load<Floats>(block.row_values + 2 * kLanes);
  const Ints bits = (Ints)(to_floats(code & size) * step + offset);
  out.value = (Floats)(bits ^ (code & ~size) << 24);
  out.level = to_floats(level);
  return out;
}

}  // namespace
}  // namespace precalib
