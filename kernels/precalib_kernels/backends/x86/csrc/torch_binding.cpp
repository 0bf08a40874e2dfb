// `precalib::cpu_linear` as torch calls it: by the C functions that libtorch keeps stable. Their
// addresses come from Python, so this is compiled without torch and fits every version that has them.
#include <cstring>
#include <stdexcept>
#include <string>

#include "memory_layout.h"

#define EXPORT __attribute__((visibility("default")))

namespace precalib {
namespace {

using Handle = void*;      // of a tensor
using Value = uint64_t;    // an argument or a result
constexpr int64_t kMostDimensions = 16;

// In the order of `library.TORCH_FUNCTIONS` and `TORCH_CONSTANTS`. Functions return 0 for success.
struct Torch {
  int32_t (*get_data_ptr)(Handle, void**);
  int32_t (*get_dim)(Handle, int64_t*);
  int32_t (*get_numel)(Handle, int64_t*);
  int32_t (*get_sizes)(Handle, int64_t**);
  int32_t (*get_dtype)(Handle, int32_t*);
  int32_t (*get_device_type)(Handle, int32_t*);
  int32_t (*is_contiguous)(Handle, bool*);
  int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  int32_t (*delete_tensor)(Handle);
  int32_t (*new_library)(const char*, const char*, const char*, uint32_t, void**);
  int32_t (*implement)(void*, const char*, void (*)(Value*, uint64_t, uint64_t));
  int32_t types[3];  // by Type
  int32_t byte, cpu;
};
Torch torch;
int highest_level;  // asking the processor takes microseconds on a virtual machine

[[noreturn, gnu::cold]] void refuse(const std::string& why) {
  throw std::runtime_error("precalib::cpu_linear: " + why);
}
void check(int32_t error) {
  if (error) refuse("torch refused to tell about a tensor, or to make one");
}
std::string expected(const char* what, int64_t found, int64_t wanted) {
  return what + (" " + std::to_string(found)) + ", expected " + std::to_string(wanted);
}

// A tensor that was given to the kernel, which has to let it go.
class Tensor {
 public:
  explicit Tensor(Handle handle) : handle_(handle) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) torch.delete_tensor(handle_);
  }
  explicit operator bool() const { return handle_; }
  void* data() const { return get<void*>(torch.get_data_ptr); }
  int64_t dimensions() const { return get<int64_t>(torch.get_dim); }
  int64_t numel() const { return get<int64_t>(torch.get_numel); }
  const int64_t* sizes() const { return get<int64_t*>(torch.get_sizes); }
  int32_t type() const { return get<int32_t>(torch.get_dtype); }
  void check_plain(const char* name) const {
    if (get<int32_t>(torch.get_device_type) != torch.cpu || !get<bool>(torch.is_contiguous))
      refuse(std::string(name) + " is not contiguous in the memory of the CPU");
  }
  Handle release() {
    const Handle handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  template <class T>
  T get(int32_t (*function)(Handle, T*)) const {
    T found;
    check(function(handle_, &found));
    return found;
  }
  Handle handle_;
};

// What a Value of an optional tensor points to; the Value itself is ours to delete.
Handle optional(Value value) {
  if (!value) return nullptr;
  Value* const held = (Value*)value;
  const Handle handle = (Handle)*held;
  delete held;
  return handle;
}

// The plan in a tensor of bytes: Plan, then part_rows.
Plan read_plan(const Tensor& bytes, int64_t outputs) {
  bytes.check_plain("the plan");
  const int64_t size = bytes.numel() - int64_t(sizeof(Plan));
  if (bytes.type() != torch.byte || size < 0) refuse("this is no plan");
  const char* const data = (const char*)bytes.data();
  Plan plan;
  std::memcpy(&plan, data, sizeof plan);
  if (size != plan.part_count * 8) refuse("this is no plan");
  plan.part_rows = (const int64_t*)(data + sizeof plan);
  int64_t rows = 0;
  for (int64_t p = 0; p < plan.part_count; ++p) rows += plan.part_rows[p];
  if (rows != outputs) refuse(expected("outputs are", outputs, rows));
  return plan;
}

// (x, packed, plan, bias, outputs, level) -> y
void cpu_linear(Value* stack, uint64_t, uint64_t) {
  const Tensor x((Handle)stack[0]), packed((Handle)stack[1]), bytes((Handle)stack[2]);
  const Tensor bias(optional(stack[3]));
  const int64_t outputs = int64_t(stack[4]), wanted = int64_t(stack[5]);
  const int64_t level = wanted < 0 ? highest_level : wanted;
  const Plan plan = read_plan(bytes, outputs);
  x.check_plain("x");
  packed.check_plain("the packed weight");
  if (level > highest_level) refuse("this machine has no such level");
  if (packed.type() != torch.byte || packed.numel() != plan.packed_bytes)
    refuse(expected("bytes of the packed weight are", packed.numel(), plan.packed_bytes));
  const int32_t type = x.type();
  int64_t which = 0;
  while (which < 3 && torch.types[which] != type) ++which;
  if (which == 3) refuse("x is not of float32, bfloat16 or float16");
  const int64_t dimensions = x.dimensions();
  if (dimensions < 1 || dimensions > kMostDimensions) refuse("x has too few or too many dimensions");
  int64_t sizes[kMostDimensions], strides[kMostDimensions];
  std::memcpy(sizes, x.sizes(), size_t(dimensions) * sizeof *sizes);
  if (sizes[dimensions - 1] != plan.columns)
    refuse(expected("columns of x are", sizes[dimensions - 1], plan.columns));
  sizes[dimensions - 1] = outputs;
  int64_t stride = 1;
  for (int64_t d = dimensions - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;  // also where there are no rows, as torch has it
  }
  if (bias) {
    bias.check_plain("the bias");
    if (bias.type() != type) refuse("the bias is not of the type of x");
    if (bias.dimensions() != 1 || bias.numel() != outputs)
      refuse(expected("values of the bias are", bias.numel(), outputs));
  }
  Handle made;
  check(torch.empty_strided(dimensions, sizes, strides, type, torch.cpu, 0, &made));
  Tensor y(made);
  precalib_linear(&plan, level, packed.data(), x.data(), bias ? bias.data() : nullptr, y.data(),
                  x.numel() / plan.columns, which);
  stack[0] = (Value)y.release();
}

}  // namespace
}  // namespace precalib

// Make it the operator's implementation on CPUs; 0 for success.
extern "C" EXPORT int32_t precalib_register(const precalib::Torch* functions) {
  using namespace precalib;
  torch = *functions;
  highest_level = precalib_level();
  void* library;
  if (int32_t error = torch.new_library("precalib", "CPU", __FILE__, __LINE__, &library)) return error;
  return torch.implement(library, "cpu_linear", cpu_linear);
}
