// Activations: x times the column scale, permuted to the column order of `decode.h`; in fixed point
// for the codebook entries, and in float32 for salient weights.
//
// Fixed point is per group and row: kSplits int8 splits, which are the signed base-256 digits of a
// value in units of the group's largest magnitude. Two splits are more exact than bfloat16, three
// about as exact as float32. One is coarser, and used only on request.
#pragma once

#include "weights.h"

namespace precalib {
namespace {

constexpr int kTile = 4;  // rows of x whose float32 values lie side by side

// Where splits are stored. A virtual row is a split of a row of x.
//
// Without kMatrix they lie one after another. With it, eight columns of a virtual row are followed
// by those of the next one, as the operand of SMMLA.
template <bool kMatrix>
constexpr int64_t split_place(int64_t columns, int64_t virtual_row, int64_t column) {
  if (!kMatrix) return virtual_row * columns + column;
  return virtual_row / 2 * 2 * columns + column / 8 * 16 + virtual_row % 2 * 8 + column % 8;
}

template <Type kType>
inline void permute_typed(const PackedLayout& layout, const void* x, int64_t row,
                          const uint16_t* column_scale, float* out) {
  for (int64_t first = 0; first < layout.columns; first += layout.group_size) {
    const int64_t quarter = min(layout.group_size, layout.columns - first) / 4;
    for (int64_t t = 0; t < quarter; t += 4) {
      F32x4 v[4];
      for (int s = 0; s < 4; ++s) {
        const int64_t column = first + s * quarter + t;
        v[s] = load_floats<kType>(x, row * layout.columns + column);
        if (column_scale) v[s] *= load_fp16(column_scale + column);
      }
      store_alternating(out + first + 4 * t, v[0], v[1], v[2], v[3]);
    }
  }
}

// Permutes a row of x, group by group: column s * L/4 + t of a group, where L is its length, goes
// to 4 * t + s. out: [columns].
inline void permute_row(const PackedLayout& layout, const void* x, int64_t row, int64_t type,
                        const uint16_t* column_scale, float* out) {
  switch (type) {
    case kFloat32: return permute_typed<kFloat32>(layout, x, row, column_scale, out);
    case kFloat16: return permute_typed<kFloat16>(layout, x, row, column_scale, out);
    default: return permute_typed<kBfloat16>(layout, x, row, column_scale, out);
  }
}

// Unit and sum of one quantized group of a row of x.
struct QuantizedGroup {
  float unit;   // value of one in the last split
  float total;  // sum of the quantized values, in units
};

// Quantizes one group of `count` columns of x. at(d, k): where the eight int8 values of split d
// from column k on are stored; split 0 is the most significant.
template <int kSplits, class At>
inline QuantizedGroup quantize_group(const float* x, int64_t count, At&& at) {
  // All splits at 127, less what rounding may add.
  constexpr float kLargest = kSplits == 1 ? 127 : kSplits == 2 ? 127 * 257 - 1 : 127 * 65793 - 2;
  I32x4 peaks = {};  // floats of one sign are in the order of their bits, NaN last
  for (int64_t k = 0; k < count; k += 4) peaks = larger(peaks, load<I32x4>(x + k) & 0x7fffffff);
  const int32_t bits = largest_lane(peaks);
  const bool finite = bits < 0x7f800000;
  const float peak = load<float>(&bits);
  // below that, 1 / unit would overflow
  const float inverse = finite && peak > 0x1p-100f ? kLargest / peak : 0;
  I32x4 sums[kSplits] = {};
  for (int64_t k = 0; k < count; k += 8) {
    I32x4 rest[2];
    for (int i = 0; i < 2; ++i) rest[i] = round_to_i32(load<F32x4>(x + k + 4 * i) * inverse);
    for (int d = kSplits - 1; d >= 0; --d) {
      I32x4 split[2];
      for (int i = 0; i < 2; ++i) {
        split[i] = d ? rest[i] << 24 >> 24 : rest[i];
        rest[i] = (rest[i] - split[i]) >> 8;
        sums[d] += split[i];
      }
      store(at(d, k), narrow_to_i8(split[0], split[1]));
    }
  }
  QuantizedGroup out = {finite ? peak / kLargest : __builtin_nanf(""), 0};
  for (int d = 0; d < kSplits; ++d) out.total = out.total * 256 + float(sum_of_lanes(sums[d]));
  return out;
}

// Floats of a tile of x, [groups][group_size + 1][kTile]: each group is followed by a column of
// zeros, at which the positions of unused salient slots point.
inline int64_t tile_size(const PackedLayout& layout) {
  return layout.salient_count ? layout.groups * (layout.group_size + 1) * kTile : 0;
}

// Some rows of x for one shard, as the kernels read them.
struct Inputs {
  const int8_t* splits;          // [virtual rows][columns], see `split_place`
  const QuantizedGroup* groups;  // [rows][groups]
  const float* tiles;            // [tile of rows][tile_size]; unused without salient weights
};

// Prepares kTile rows of x from `first` on, of which `count` exist: the others become zeros.
// tile: which of the tiles in the buffers; scratch: [kTile][columns].
template <bool kMatrix, int kSplits>
void prepare_tile(const PackedLayout& layout, const Call& call, const uint16_t* column_scale,
                  int64_t first, int64_t count, int64_t tile, float* scratch, int8_t* splits,
                  QuantizedGroup* groups, float* tiles) {
  const int64_t columns = layout.columns;
  for (int64_t r = 0; r < kTile; ++r) {
    float* const x = scratch + r * columns;
    if (r < count) permute_row(layout, call.x, first + r, call.type, column_scale, x);
    else std::memset(x, 0, size_t(columns) * sizeof(float));
    const int64_t row = tile * kTile + r;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t start = g * layout.group_size;
      groups[row * layout.groups + g] = quantize_group<kSplits>(
          x + start, min(layout.group_size, columns - start), [&](int d, int64_t k) {
            return splits + split_place<kMatrix>(columns, row * kSplits + d, start + k);
          });
    }
  }
  if (!layout.salient_count) return;
  float* out = tiles + tile * tile_size(layout);
  for (int64_t first = 0; first < columns; first += layout.group_size) {
    const int64_t count = min(layout.group_size, columns - first);
    for (int64_t k = first; k < first + count; k += 4, out += 4 * kTile)
      store_alternating(out, load<F32x4>(scratch + k), load<F32x4>(scratch + columns + k),
                        load<F32x4>(scratch + 2 * columns + k),
                        load<F32x4>(scratch + 3 * columns + k));
    const int64_t rest = (layout.group_size + 1 - count) * kTile;
    std::memset(out, 0, size_t(rest) * sizeof(float));
    out += rest;
  }
}

// Joins the sums of all splits. sum(d): those of split d.
template <int kSplits, class Sum>
inline F32x4 join_splits(Sum&& sum) {
  F32x4 joined = to_f32(sum(0));
#pragma GCC unroll 2  // else GCC keeps the sums in memory
  for (int d = 1; d < kSplits; ++d) joined = joined * 256 + to_f32(sum(d));
  return joined;
}

}  // namespace
}  // namespace precalib
