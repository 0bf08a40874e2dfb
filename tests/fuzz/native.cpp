// Random tensors for the compiled CPU kernels and for the compiled parts of the method.
//
// libFuzzer calls LLVMFuzzerTestOneInput with bytes of its choice and keeps those that reach new
// code. The first bytes choose a target and its sizes; the rest fills the tensors. What Python
// checks before a kernel is called holds here as well: sizes fit each other, scales are finite,
// salient positions lie in their group. Everything else may have any value. `native.py` compiles
// this with sanitizers, so that reading or writing out of a tensor ends the run.
//
// Checked besides: a product is the same twice, and codes are within their codebook.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../kernels/precalib_kernels/backends/x86/csrc/gather_rows.h"
#include "../../kernels/precalib_kernels/backends/x86/csrc/isa_dispatch.h"
#include "../../offline_quantize/method/csrc/feedback_task.h"

extern "C" int32_t encode_with_feedback(const FeedbackTask*);
extern "C" int32_t trellis_search(const float* weights, const float* unit, const uint8_t* forced,
                                  const float* importance, const int32_t* codebook,
                                  int32_t codebook_size, int32_t limit, int64_t groups,
                                  int32_t size, uint8_t* codes, float* values);

// GCC's code calls this at every basic block; libFuzzer looks at the counters.
namespace {
__attribute__((section("__libfuzzer_extra_counters"))) uint8_t counters[1 << 16];
}
extern "C" void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& counter = counters[(place ^ place >> 16) % sizeof counters];
  counter = uint8_t(counter + (counter < 255));
}
// Compared floats, which libFuzzer has no function for.
extern "C" void __sanitizer_cov_trace_cmpf(float, float) {}
extern "C" void __sanitizer_cov_trace_cmpd(double, double) {}

namespace {

using namespace precalib;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "native: %s\n", what);
  std::abort();
}

// The bytes of a case, and after their end numbers that follow from them.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  uint8_t next() {
    if (data_ < end_) return uint8_t(state_ = *data_++);
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint8_t(state_ >> 33);
  }
  int64_t between(int64_t low, int64_t high) {
    const int64_t number = next() << 8 | next();
    return low + number % (high - low + 1);
  }
  bool flag() { return next() & 1; }
  template <class T>
  T number() {
    T value;
    for (size_t i = 0; i < sizeof value; ++i) ((uint8_t*)&value)[i] = next();
    return value;
  }
  // A float of any size, or any at all.
  float any_float() {
    const float found = number<float>();
    return next() < 32 ? found : float(int8_t(next())) / 64;
  }
  float finite() {
    const float found = any_float();
    return found - found == 0 ? found : 1;
  }
  uint16_t finite_half() {
    const uint16_t bits = number<uint16_t>();
    return (bits & 0x7c00) == 0x7c00 ? uint16_t(bits & ~0x4000) : bits;
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
  uint64_t state_ = 1;
};

// Memory that ends where it should, at a multiple of `alignment`, so that the sanitizer sees what
// lies beyond.
template <class T>
struct Array {
  std::unique_ptr<void, void (*)(void*)> memory;
  T* data;
  int64_t size;
  explicit Array(int64_t size, size_t alignment = 64) : memory(nullptr, std::free), size(size) {
    void* made = nullptr;
    const size_t bytes = std::max<size_t>(size_t(size) * sizeof(T), 1);
    if (posix_memalign(&made, alignment, bytes)) std::abort();
    memory.reset(made);
    data = static_cast<T*>(made);
  }
  T* begin() { return data; }
  T* end() { return data + size; }
};

int64_t aligned(int64_t size) { return (size + 63) / 64 * 64; }

// A layout with its numbers of rows.
struct Sizes {
  std::vector<int64_t> shard_rows;
  X86Layout layout = {};
  int64_t outputs = 0, blocks = 0;

  explicit Sizes(Bytes& bytes) {
    static const int64_t kGroups[] = {32, 64, 96, 128, 160, 256, 512, 544, 1024};
    layout.bits = bytes.between(2, 5);
    layout.group_size = kGroups[bytes.between(0, 8)];
    layout.columns = 32 * bytes.between(1, 40);
    layout.groups = (layout.columns + layout.group_size - 1) / layout.group_size;
    layout.shard_count = bytes.between(1, 3);
    for (int64_t p = 0; p < layout.shard_count; ++p) {
      shard_rows.push_back(bytes.between(1, 40));
      outputs += shard_rows.back();
      blocks += (shard_rows.back() + kLanes - 1) / kLanes;
    }
    layout.shard_rows = shard_rows.data();
    const int kind = int(bytes.between(0, 2));
    layout.uniform = kind == 0;
    layout.trellis = kind == 2;
    layout.salient_count = bytes.flag() ? bytes.between(0, 6) : 0;
    layout.position_bytes = layout.group_size <= 128 ? 1 : 2;
    layout.salient_mask = bytes.flag() ? 127 : 255;
    layout.log_scales = bytes.flag();
    layout.column_scale = bytes.flag();
    layout.int8_inputs = bytes.flag();
    layout.nibbles = (layout.bits == 3 || layout.bits == 4) && bytes.flag();
    layout.block_bytes = layout.columns / kChunk * kVector * layout.bits;
    layout.metadata_bytes = kLanes * ((layout.log_scales ? 1 : 2) + layout.uniform +
                                      layout.salient_count * (layout.position_bytes + 2));
    layout.metadata_offset = blocks * layout.block_bytes;
    layout.row_offset =
        layout.metadata_offset + aligned(blocks * layout.groups * layout.metadata_bytes);
    layout.column_offset = layout.row_offset + blocks * 3 * kLanes * 4;
    layout.packed_bytes =
        layout.column_offset +
        (layout.column_scale ? aligned(layout.shard_count * layout.columns * 2) : 0);
    fill_codebook(bytes);
    for (int i = 0; i < 16; ++i) layout.factors[i] = std::exp2(float(-i) / 16);
  }

  // By index: high bits of the code, then u[k], u[k-1], u[k-2].
  void fill_codebook(Bytes& bytes) {
    int8_t entries[64];
    for (int i = 0; i < 64; ++i) entries[i] = int8_t(layout.uniform ? i : bytes.next());
    for (int index = 0; index < 128; ++index) {
      const int at = index % (4 << layout.bits), code = at >> 2;
      const int entry = layout.trellis ? 2 * (code ^ (at & 1)) + (at >> 1 & 1) : code;
      layout.codebook[index] = entries[entry];
    }
  }
};

// A packed weight as `repack` makes one.
Array<uint8_t> packed_weight(const Sizes& sizes, Bytes& bytes) {
  const X86Layout& layout = sizes.layout;
  Array<uint8_t> packed(layout.packed_bytes);
  for (uint8_t& byte : packed) byte = bytes.next();
  for (int64_t block = 0; block < sizes.blocks; ++block) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      uint8_t* at = packed.data + layout.metadata_offset +
                    (block * layout.groups + g) * layout.metadata_bytes;
      const int64_t columns = std::min(layout.group_size, layout.columns - g * layout.group_size);
      for (int lane = 0; lane < kLanes && !layout.log_scales; ++lane) {
        const uint16_t scale = bytes.finite_half();
        std::memcpy(at + 2 * lane, &scale, 2);
      }
      at += kLanes * ((layout.log_scales ? 1 : 2) + layout.uniform);
      for (int64_t slot = 0; slot < layout.salient_count; ++slot) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const bool unused = bytes.next() < 64;
          const int64_t none = int64_t(1) << (8 * layout.position_bytes - 1);
          const uint16_t place = uint16_t(unused ? none : bytes.between(0, columns - 1));
          std::memcpy(at + lane * layout.position_bytes, &place, size_t(layout.position_bytes));
        }
        at += kLanes * (layout.position_bytes + 2);
      }
    }
    float* const rows = (float*)(packed.data + layout.row_offset) + block * 3 * kLanes;
    for (int i = 0; i < 3 * kLanes; ++i) rows[i] = bytes.finite();
  }
  if (layout.column_scale)
    for (int64_t i = 0; i < layout.shard_count * layout.columns; ++i) {
      const uint16_t scale = bytes.finite_half();
      std::memcpy(packed.data + layout.column_offset + 2 * i, &scale, 2);
    }
  return packed;
}

int64_t bytes_of(int64_t type) { return type == kFloat32 ? 4 : 2; }

void fill(Array<uint8_t>& values, int64_t type, Bytes& bytes) {
  for (int64_t i = 0; i < values.size / bytes_of(type); ++i) {
    if (type == kFloat32) {
      const float value = bytes.any_float();
      std::memcpy(values.data + 4 * i, &value, 4);
    } else {
      const uint16_t value = bytes.number<uint16_t>();  // any, also infinite or not a number
      std::memcpy(values.data + 2 * i, &value, 2);
    }
  }
}

void products(Bytes& bytes) {
  Sizes sizes(bytes);
  const SupportedIsas& isas = supported_isas();
  const Isa isa = isas.isas[bytes.between(0, isas.count - 1)];
  if (!reads(isa, sizes.layout)) sizes.layout.nibbles ^= 1;
  const int64_t type = bytes.between(0, 2), rows = bytes.between(0, bytes.flag() ? 70 : 9);
  const size_t alignment = bytes.flag() ? 64 : 16;
  const bool has_bias = bytes.flag();
  const Array<uint8_t> packed = packed_weight(sizes, bytes);
  Array<uint8_t> x(rows * sizes.layout.columns * bytes_of(type), alignment);
  Array<uint8_t> bias(sizes.outputs * bytes_of(type), alignment);
  fill(x, type, bytes);
  fill(bias, type, bytes);
  Array<uint8_t> y(rows * sizes.outputs * bytes_of(type), alignment), again(y.size, alignment);
  for (Array<uint8_t>* out : {&y, &again}) {
    std::memset(out->data, 0xa5, size_t(out->size));
    linear(isa, {&sizes.layout, packed.data, x.data, has_bias ? bias.data : nullptr, out->data,
                 rows, type, {}});
  }
  if (std::memcmp(y.data, again.data, size_t(y.size))) fail("a product differs from itself");
}

void rows_by_number(Bytes& bytes) {
  const Sizes sizes(bytes);
  const int64_t type = bytes.between(0, 2), count = bytes.between(0, 5);
  const Array<uint8_t> packed = packed_weight(sizes, bytes);
  Array<int64_t> ids(count);
  for (int64_t& id : ids) id = bytes.between(0, sizes.outputs - 1);
  Array<uint8_t> y(count * sizes.layout.columns * bytes_of(type));
  gather_rows(sizes.layout, packed.data, ids.data, count, Type(type), y.data);
}

// A codebook, and its largest magnitude.
struct Codebook {
  std::vector<int32_t> entries;
  int32_t limit = 1;
  Codebook(Bytes& bytes, int size) {
    for (int i = 0; i < size; ++i) entries.push_back(int8_t(bytes.next()));
    for (const int32_t entry : entries) limit = std::max(limit, std::abs(entry));
  }
};

template <class T, class Make>
Array<T> filled(int64_t size, Make&& make) {
  Array<T> made(size, 16);
  for (T& value : made) value = T(make());
  return made;
}

void trellis(Bytes& bytes) {
  const int bits = int(bytes.between(2, 5));
  const int64_t groups = bytes.between(0, 40), size = bytes.between(1, 130);
  const Codebook codebook(bytes, 2 << bits);
  const auto any = [&] { return bytes.any_float(); };
  const bool weighted = bytes.flag();
  auto weights = filled<float>(groups * size, any), unit = filled<float>(groups, any);
  auto importance = filled<float>(groups * size, any);
  auto forced = filled<uint8_t>(groups * size, [&] { return bytes.between(0, 2); });
  Array<uint8_t> codes(groups * size);
  Array<float> values(groups * size);
  trellis_search(weights.data, unit.data, forced.data, weighted ? importance.data : nullptr,
                 codebook.entries.data(), int32_t(codebook.entries.size()), codebook.limit, groups,
                 int32_t(size), codes.data, values.data);
  for (const uint8_t code : codes)
    if (code >> bits) fail("the trellis search gives a code past its bits");
}

void feedback(Bytes& bytes) {
  const int bits = int(bytes.between(2, 5)), kind = int(bytes.between(0, 2));
  const bool uniform = kind == 0, with_trellis = kind == 2, salient = bytes.flag();
  FeedbackTask task = {};
  task.rows = bytes.between(1, 40);
  task.columns = 32 * bytes.between(1, 5);
  task.group_size = int32_t(32 * bytes.between(1, 4));
  task.groups = int32_t((task.columns + task.group_size - 1) / task.group_size);
  task.candidates = int32_t(bytes.between(1, 3));
  const Codebook codebook(bytes, (with_trellis ? 2 : 1) << bits);
  task.codebook = uniform ? nullptr : codebook.entries.data();
  task.codebook_size = uniform ? 1 << bits : int32_t(codebook.entries.size());
  task.limit = uniform ? (1 << bits) - 1 : codebook.limit;
  task.trellis = with_trellis;
  const int64_t padded = task.groups * int64_t(task.group_size), scales = task.rows * task.groups;
  const auto any = [&] { return bytes.any_float(); };
  auto weights = filled<float>(task.rows * padded, any);
  auto effects = filled<float>(task.columns * task.columns, any);
  auto importance = filled<float>(task.columns, any);
  auto mask = filled<uint8_t>(task.rows * padded, [&] { return salient && bytes.next() < 8; });
  auto unit = filled<float>(task.candidates * scales, any), step = filled<float>(unit.size, any);
  auto zero = filled<float>(unit.size, any);
  auto inverse = filled<float>(task.rows, any), scale = filled<float>(task.rows, any);
  auto offset = filled<float>(task.rows, any);
  task.weights = weights.data, task.effects = effects.data, task.importance = importance.data;
  task.salient = mask.data, task.unit = unit.data, task.step = step.data;
  task.zero = uniform ? zero.data : nullptr;
  if (salient) {
    task.salient_inverse = inverse.data, task.salient_scale = scale.data;
    task.salient_offset = offset.data;
    task.salient_sign = bytes.flag() ? 128 : 0;
    task.salient_high = task.salient_sign ? 127 : 255;
  }
  Array<uint8_t> codes(task.rows * padded), chosen(scales);
  Array<float> values(task.rows * padded);
  task.codes = codes.data, task.values = values.data, task.chosen = chosen.data;
  encode_with_feedback(&task);
  for (int64_t row = 0; row < task.rows; ++row)
    for (int64_t k = 0; k < task.columns; ++k)
      if (!mask.data[row * padded + k] && codes.data[row * padded + k] >> bits)
        fail("error feedback gives a code past its bits");
  for (const uint8_t candidate : chosen)
    if (candidate >= task.candidates) fail("error feedback chooses a scale that is not there");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  switch (bytes.next() % 6) {
    case 0: rows_by_number(bytes); break;
    case 1: trellis(bytes); break;
    case 2: feedback(bytes); break;
    default: products(bytes);
  }
  return 0;
}
