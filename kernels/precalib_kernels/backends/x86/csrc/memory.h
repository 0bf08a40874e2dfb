// Memory of the CPU kernels, on every processor: unaligned loads and stores, and buffers. All of it
// has internal linkage, so that each ISA has its own copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace precalib {
namespace {

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Uninitialized memory of one call or thread, aligned to 64 bytes.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data((T*)std::aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64)) {
    if (data == nullptr) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace precalib
