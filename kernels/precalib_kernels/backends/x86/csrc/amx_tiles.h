// AMX tile registers: configuration, and the fence that their intrinsics need. A tile has 16 rows
// of 64 bytes.
#pragma once

#include "decode.h"

namespace precalib {
namespace {

constexpr int kTile = 16;  // rows of x in a tile

// Keeps GCC from moving memory accesses across it: its AMX intrinsics do not declare that they read
// and write memory.
inline void compiler_fence() { asm volatile("" ::: "memory"); }

#if defined(__AMX_TILE__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Configures the thread's tiles, and restores on destruction what another library had configured.
// Tiles 0 to 5 have a row per row of x, for accumulators and activations; 6 and 7 hold weights.
class AmxTiles {
 public:
  explicit AmxTiles(int64_t rows_of_x) {
    _tile_storeconfig(&before_);
    asm volatile("" : "+m"(before_));  // GCC takes these instructions to touch eight bytes only
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = uint8_t(t < 6 ? min(rows_of_x, kTile) : kTile);
      config.bytes[t] = 64;
    }
    asm volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  ~AmxTiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }
  AmxTiles(const AmxTiles&) = delete;

 private:
  TileConfig before_;
};

#else

class AmxTiles {
 public:
  explicit AmxTiles(int64_t) {}
};

#endif

}  // namespace
}  // namespace precalib
