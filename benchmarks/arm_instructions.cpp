// One product by the Arm kernels, or by those of ggml, over zeros: for counting instructions, which
// do not depend on the values. `arm_instructions.py` compiles and runs it.
//
//   arm_instructions KERNEL ROWS COLUMNS M [LAYOUT TYPE ISA]
//
// ROWS and COLUMNS are those of the weight. KERNEL is "precalib", with the bytes of the layout in a
// file, or a function of ggml.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/precalib_kernels/backends/x86/csrc/memory_layout.h"

using precalib::X86Layout;
extern "C" int32_t precalib_linear(const X86Layout*, const uint8_t* packed, const void* x,
                                   const void* bias, void* y, int64_t rows, int64_t type,
                                   int64_t isa);

namespace {

using Bytes = std::vector<uint8_t>;

// Zeros that the system gives, at no instruction of the program.
struct Zeros {
  uint8_t* at;
  explicit Zeros(int64_t size)
      : at((uint8_t*)mmap(nullptr, size_t(size), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (at == MAP_FAILED) std::exit(2);
  }
  uint8_t* data() const { return at; }
};

// A weight takes at most two bytes in all formats; x and y are at most float32.
struct Memory {
  Zeros weight, x, y;
  Memory(int64_t rows, int64_t columns, int64_t m)
      : weight(rows * columns * 2), x(m * columns * 8), y(m * rows * 4) {}
};

Bytes read(const char* path) {
  Bytes bytes;
  std::FILE* const file = std::fopen(path, "rb");
  if (!file) std::exit(2);
  for (int c; (c = std::fgetc(file)) != EOF;) bytes.push_back(uint8_t(c));
  std::fclose(file);
  return bytes;
}

int precalib_product(char** words, Memory& memory, int64_t m) {
  Bytes bytes = read(words[5]);
  X86Layout layout;
  std::memcpy(&layout, bytes.data(), sizeof layout);
  layout.shard_rows = (const int64_t*)(bytes.data() + sizeof layout);
  return precalib_linear(&layout, memory.weight.data(), memory.x.data(), nullptr, memory.y.data(),
                         m, std::atoll(words[6]), std::atoll(words[7]));
}

}  // namespace

#if defined(WITH_GGML)
extern "C" {
typedef void VecDot(int, float*, size_t, const void*, size_t, const void*, size_t, int);
typedef void Repacked(int, float*, size_t, const void*, const void*, int, int);
VecDot ggml_vec_dot_q4_K_q8_K, ggml_vec_dot_q4_0_q8_0;
Repacked ggml_gemv_q4_0_4x4_q8_0, ggml_gemm_q4_0_4x4_q8_0, ggml_gemv_q4_0_4x8_q8_0,
    ggml_gemm_q4_0_4x8_q8_0, ggml_gemv_q4_K_8x4_q8_K, ggml_gemm_q4_K_8x4_q8_K,
    ggml_gemv_q4_K_8x8_q8_K, ggml_gemm_q4_K_8x8_q8_K;
}

namespace {

struct Entry {
  const char* name;
  VecDot* dot;  // or the other two
  Repacked *gemv, *gemm;
  int at_once;  // rows of weights and of x that `dot` takes at a time, where there are two
  int64_t block, weight_bytes, x_bytes;  // columns of a block and its bytes
};
const Entry kEntries[] = {
    {"q4_K", ggml_vec_dot_q4_K_q8_K, nullptr, nullptr, PRECALIB_DOT_ROWS, 256, 144, 292},
    {"q4_0", ggml_vec_dot_q4_0_q8_0, nullptr, nullptr, PRECALIB_DOT_ROWS, 32, 18, 34},
    {"q4_0_4x4", nullptr, ggml_gemv_q4_0_4x4_q8_0, ggml_gemm_q4_0_4x4_q8_0, 1, 32, 18, 34},
    {"q4_0_4x8", nullptr, ggml_gemv_q4_0_4x8_q8_0, ggml_gemm_q4_0_4x8_q8_0, 1, 32, 18, 34},
    {"q4_K_8x4", nullptr, ggml_gemv_q4_K_8x4_q8_K, ggml_gemm_q4_K_8x4_q8_K, 1, 256, 144, 292},
    {"q4_K_8x8", nullptr, ggml_gemv_q4_K_8x8_q8_K, ggml_gemm_q4_K_8x8_q8_K, 1, 256, 144, 292},
};

// As ggml's matrix product calls them: repacked kernels take M in fours, then one by one.
int ggml_product(const std::string& name, Memory& memory, int64_t rows, int64_t columns,
                 int64_t m) {
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    const size_t weight = size_t(columns / entry.block * entry.weight_bytes);
    const size_t x = size_t(columns / entry.block * entry.x_bytes);
    float* const y = (float*)memory.y.data();
    if (entry.dot) {
      const int64_t at_once = m % entry.at_once ? 1 : entry.at_once;
      for (int64_t r = 0; r < m; r += at_once)
        for (int64_t n = 0; n < rows; n += at_once)
          entry.dot(int(columns), y + r * rows + n, size_t(rows), memory.weight.data() + n * weight,
                    weight, memory.x.data() + r * x, x, int(at_once));
      return 0;
    }
    const int64_t fours = m / 4 * 4;
    if (fours)
      entry.gemm(int(columns), y, size_t(rows), memory.weight.data(), memory.x.data(), int(fours),
                 int(rows));
    for (int64_t r = fours; r < m; ++r)
      entry.gemv(int(columns), y + r * rows, size_t(rows), memory.weight.data(),
                 memory.x.data() + r * x, 1, int(rows));
    return 0;
  }
  return 2;
}

}  // namespace

// What the files of ggml want and the kernels here never call.
extern "C" {
float ggml_table_f32_ue4m3[256];
void quantize_row_q8_K_ref() { std::abort(); }
#define ABSENT(name) \
  void name() { std::abort(); }
ABSENT(ggml_gemm_q1_0_4x8_q8_0_generic)
ABSENT(ggml_gemm_q4_0_4x8_q8_0_generic)
ABSENT(ggml_gemm_q4_0_8x8_q8_0_generic)
ABSENT(ggml_gemm_q4_K_8x8_q8_K_generic)
ABSENT(ggml_gemm_q5_K_8x8_q8_K_generic)
ABSENT(ggml_gemm_q6_K_8x8_q8_K_generic)
ABSENT(ggml_gemm_q8_0_4x8_q8_0_generic)
ABSENT(ggml_gemv_q4_0_8x8_q8_0_generic)
}
#else
namespace {
int ggml_product(const std::string&, Memory&, int64_t, int64_t, int64_t) { return 2; }
}  // namespace
#endif

int main(int count, char** words) {
  if (count < 5) return 2;
  const int64_t rows = std::atoll(words[2]), columns = std::atoll(words[3]),
                m = std::atoll(words[4]);
  Memory memory(rows, columns, m);
  if (std::string(words[1]) == "precalib")
    return count < 8 ? 2 : precalib_product(words, memory, m);
  return ggml_product(words[1], memory, rows, columns, m);
}
