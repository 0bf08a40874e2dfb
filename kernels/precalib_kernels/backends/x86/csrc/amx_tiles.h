// Tiles of AMX: 16 rows of 64 bytes.
#pragma once

#include "decode.h"

namespace precalib {
namespace {

constexpr int kTile = 16;  // rows of x in a tile

// Memory is written before and read after this: GCC's intrinsics do not say that tiles are loaded.
inline void in_order() { asm volatile("" ::: "memory"); }

#if defined(__AMX_TILE__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-5 have a row per row of x, for sums and inputs; 6 and 7 are for weights. They belong to
// the thread: what another library may have set up is put back.
class Tiles {
 public:
  explicit Tiles(int64_t rows_of_x) {
    _tile_storeconfig(&before_);
    asm volatile("" : "+m"(before_));  // GCC takes these instructions to touch eight bytes only
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = uint8_t(t < 6 ? smaller(rows_of_x, kTile) : kTile);
      config.bytes[t] = 64;
    }
    asm volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  TileConfig before_;
};

#else

class Tiles {
 public:
  explicit Tiles(int64_t) {}
};

#endif

}  // namespace
}  // namespace precalib
