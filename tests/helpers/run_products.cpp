// Computes products with the library of Arm kernels, as a program without torch: for an emulator.
//
//   run_products PROBLEMS RESULTS
//
// PROBLEMS holds one problem after another: eight int64 (rows, type, isa, bytes of the layout, of
// the packed weight, of x, of the bias and of y), then those bytes but for y. RESULTS gets y of all
// of them. Prints "ISA kernel" for each problem. With isa -1, x are numbers of rows (int64) and y are
// these rows of the weight.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kernels/precalib_kernels/backends/x86/csrc/memory_layout.h"

using precalib::X86Layout;

extern "C" int64_t precalib_layout_bytes();
extern "C" int32_t precalib_isa_state(int64_t isa);
extern "C" const char* precalib_kernel_for(const X86Layout*, int64_t type, int64_t rows);
extern "C" void precalib_gather_rows(const X86Layout*, const uint8_t* packed, const int64_t* ids,
                                     int64_t count, int64_t type, void* y);
extern "C" int32_t precalib_linear(const X86Layout*, const uint8_t* packed, const void* x,
                                   const void* bias, void* y, int64_t rows, int64_t type,
                                   int64_t isa);

namespace {

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "run_products: %s\n", why);
  std::exit(1);
}

// Bytes of their own, at a multiple of 64 and no longer than they are: reading past them is seen.
struct Bytes {
  std::vector<char> memory;
  explicit Bytes(int64_t size) : memory(size_t(size) + 64) {}
  char* data() { return memory.data() + -(uintptr_t)memory.data() % 64; }
};

Bytes read(std::FILE* file, int64_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size_t(size), file) != size_t(size)) fail("cut short");
  return bytes;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) fail("usage: run_products PROBLEMS RESULTS");
  if (precalib_layout_bytes() != sizeof(X86Layout)) fail("another X86Layout");
  std::FILE* const in = std::fopen(words[1], "rb");
  std::FILE* const out = std::fopen(words[2], "wb");
  if (!in || !out) fail("cannot open its files");
  int64_t head[8];
  while (std::fread(head, sizeof head, 1, in) == 1) {
    Bytes layout = read(in, head[3]), packed = read(in, head[4]), x = read(in, head[5]);
    Bytes bias = read(in, head[6]), y(head[7]);
    std::memset(y.data(), 0xff, size_t(head[7]));
    X86Layout made;
    std::memcpy(&made, layout.data(), sizeof made);
    made.shard_rows = (const int64_t*)(layout.data() + sizeof made);
    if (head[2] < 0) {
      precalib_gather_rows(&made, (const uint8_t*)packed.data(), (const int64_t*)x.data(), head[0],
                           head[1], y.data());
      std::printf("-1 gather_rows\n");
      std::fwrite(y.data(), 1, size_t(head[7]), out);
      continue;
    }
    if (precalib_linear(&made, (const uint8_t*)packed.data(), x.data(),
                        head[6] ? bias.data() : nullptr, y.data(), head[0], head[1], head[2]))
      fail("this machine or the library lacks the ISA");
    std::printf("%lld %s\n", (long long)head[2], precalib_kernel_for(&made, head[1], head[0]));
    std::fwrite(y.data(), 1, size_t(head[7]), out);
  }
  return std::fclose(out) ? 1 : 0;
}
