// Looks rows up as problems of a file say, for tests in an emulator: see arm_emulator.py.
//     run_gather_rows PROBLEM RESULT
// PROBLEM: sizes of the layout, the packed weight and the ids as int64, then these; RESULT: float32.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kernels/precalib_kernels/backends/x86/csrc/gather_rows.h"

using Bytes = std::vector<uint8_t>;

static Bytes take(std::FILE* file, int64_t size) {
  Bytes bytes(size_t(size) + 1);
  if (std::fread(bytes.data(), 1, size_t(size), file) != size_t(size)) std::abort();
  return bytes;
}

int main(int, char** arguments) {
  std::FILE* const problem = std::fopen(arguments[1], "rb");
  int64_t sizes[3];
  if (!problem || std::fread(sizes, sizeof *sizes, 3, problem) != 3) return 1;
  const Bytes fields = take(problem, sizes[0]), packed = take(problem, sizes[1]);
  const Bytes ids = take(problem, sizes[2]);
  precalib::X86Layout layout;
  std::memcpy(&layout, fields.data(), sizeof layout);
  layout.shard_rows = (const int64_t*)(fields.data() + sizeof layout);
  const int64_t count = sizes[2] / 8;
  std::vector<float> rows(size_t(count * layout.columns));
  precalib::gather_rows(layout, packed.data(), (const int64_t*)ids.data(), count,
                        precalib::kFloat32, rows.data());
  std::FILE* const result = std::fopen(arguments[2], "wb");
  return !result || std::fwrite(rows.data(), sizeof(float), rows.size(), result) != rows.size() ||
         std::fclose(result);
}
