// AMX's tiles in software: included before the sources of ISA `amx`, so that what it computes can
// be tested on a machine without them. What a processor refuses ends the process. Sizes and zeros
// are those of Intel's manual; sums of bfloat16 round in another order.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1

namespace software_tiles {
namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

struct State {
  Config config;
  uint8_t data[kTiles][kRows][kBytes];
};
thread_local State state = {};

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "software_tiles: %s\n", what);
  std::abort();
}

inline int rows(int tile) { return state.config.rows[tile]; }
inline int bytes(int tile) { return state.config.bytes[tile]; }

inline void load_config(const void* from) {
  std::memset(&state, 0, sizeof state);
  std::memcpy(&state.config, from, sizeof(Config));
  require(state.config.palette == 1, "a palette other than 1");
  for (int t = 0; t < 16; ++t) {
    require(t < kTiles || (!rows(t) && !bytes(t)), "a size of a tile there is not");
    require(rows(t) <= kRows && bytes(t) <= kBytes && !rows(t) == !bytes(t), "a wrong size");
  }
}

inline void store_config(void* to) { std::memcpy(to, &state.config, sizeof(Config)); }

inline void release() { std::memset(&state, 0, sizeof state); }

inline void zero(int tile) {
  require(rows(tile), "a tile without a size");
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int r = 0; r < rows(tile); ++r)
    std::memcpy(state.data[tile][r], (const char*)from + r * stride, size_t(bytes(tile)));
}

inline void store(int tile, void* to, int64_t stride) {
  require(rows(tile), "a tile without a size");
  for (int r = 0; r < rows(tile); ++r)
    std::memcpy((char*)to + r * stride, state.data[tile][r], size_t(bytes(tile)));
}

template <class T>
inline T element(int tile, int row, int at) {
  T value;
  std::memcpy(&value, state.data[tile][row] + at * int(sizeof(T)), sizeof value);
  return value;
}

// to[m][n] += sum over k of product(a[m][k], b[k][n]), of 32-bit elements.
template <class Sum, class Product>
inline void multiply(int to, int a, int b, Product&& product) {
  require(to != a && to != b && a != b, "the same tile twice");
  require(rows(to) && rows(to) == rows(a) && bytes(to) == bytes(b) && bytes(a) == 4 * rows(b),
          "tiles that do not belong together");
  for (int m = 0; m < rows(to); ++m)
    for (int n = 0; n < bytes(to) / 4; ++n) {
      Sum sum = element<Sum>(to, m, n);
      for (int k = 0; k < rows(b); ++k) sum = product(sum, m, k, n);
      std::memcpy(state.data[to][m] + 4 * n, &sum, sizeof sum);
    }
}

inline float bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void multiply_bfloats(int to, int a, int b) {
  multiply<float>(to, a, b, [&](float sum, int m, int k, int n) {
    for (int i = 0; i < 2; ++i)
      sum +=
          bfloat(element<uint16_t>(a, m, 2 * k + i)) * bfloat(element<uint16_t>(b, k, 2 * n + i));
    return sum;
  });
}

inline void multiply_bytes(int to, int a, int b) {
  multiply<int32_t>(to, a, b, [&](int32_t sum, int m, int k, int n) {
    for (int i = 0; i < 4; ++i)
      sum += int32_t(element<int8_t>(a, m, 4 * k + i)) * element<int8_t>(b, k, 4 * n + i);
    return sum;
  });
}

}  // namespace
}  // namespace software_tiles

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig software_tiles::load_config
#define _tile_storeconfig software_tiles::store_config
#define _tile_release software_tiles::release
#define _tile_zero software_tiles::zero
#define _tile_loadd software_tiles::load
#define _tile_stored software_tiles::store
#define _tile_dpbf16ps software_tiles::multiply_bfloats
#define _tile_dpbssd software_tiles::multiply_bytes
