// The operators `precalib::cpu_linear` and `precalib::cpu_gather_rows` as torch calls them: through
// the C functions of libtorch's stable ABI (torch/csrc/inductor/aoti_torch/c/shim.h). Their
// addresses come from Python, so this is compiled without torch and works with each torch that has
// them.
#include <cstring>
#include <stdexcept>
#include <string>

#include "gather_rows.h"
#include "isa_dispatch.h"

#define EXPORT __attribute__((visibility("default")))

namespace precalib {
namespace {

using Handle = void*;    // of a tensor
using Value = uint64_t;  // an argument or a result
constexpr int64_t kMostDimensions = 16;

// Functions of libtorch, each of which returns 0 for success. `FUNCTION(name, arguments)` is called
// `aoti_torch_` + name there; `library.TORCH_FUNCTIONS` has the same names.
#define PRECALIB_TORCH_FUNCTIONS(FUNCTION)                                                \
  FUNCTION(get_data_ptr, (Handle, void**))                                                \
  FUNCTION(get_dim, (Handle, int64_t*))                                                   \
  FUNCTION(get_numel, (Handle, int64_t*))                                                 \
  FUNCTION(get_sizes, (Handle, int64_t**))                                                \
  FUNCTION(get_dtype, (Handle, int32_t*))                                                 \
  FUNCTION(get_device_type, (Handle, int32_t*))                                           \
  FUNCTION(is_contiguous, (Handle, bool*))                                                \
  FUNCTION(empty_strided,                                                                 \
           (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*)) \
  FUNCTION(delete_tensor_object, (Handle))                                                \
  FUNCTION(library_init_impl, (const char*, const char*, const char*, uint32_t, void**))  \
  FUNCTION(library_impl, (void*, const char*, void (*)(Value*, uint64_t, uint64_t)))

// Constants of libtorch, `library.TORCH_CONSTANTS`.
#define PRECALIB_TORCH_CONSTANTS(CONSTANT) \
  CONSTANT(dtype_float32)                  \
  CONSTANT(dtype_bfloat16)                 \
  CONSTANT(dtype_float16)                  \
  CONSTANT(dtype_uint8)                    \
  CONSTANT(dtype_int64)                    \
  CONSTANT(device_type_cpu)

struct Torch {
#define FIELD(name, arguments) int32_t(*name) arguments;
  PRECALIB_TORCH_FUNCTIONS(FIELD)
#undef FIELD
#define FIELD(name) int32_t name;
  PRECALIB_TORCH_CONSTANTS(FIELD)
#undef FIELD
};
Torch torch;

thread_local const char* operator_name = "";  // of the call in progress, for errors

[[noreturn, gnu::cold]] void refuse(const std::string& why) {
  throw std::runtime_error(std::string("precalib::") + operator_name + ": " + why);
}
void check(int32_t error) {
  if (error) refuse("torch refused to tell about a tensor, or to make one");
}
std::string expected(const char* what, int64_t found, int64_t wanted) {
  return std::string(what) + " " + std::to_string(found) + ", expected " + std::to_string(wanted);
}

// An owned tensor handle.
class Tensor {
 public:
  explicit Tensor(Handle handle) : handle_(handle) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) torch.delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_; }
  void* data() const { return get<void*>(torch.get_data_ptr); }
  int64_t dimensions() const { return get<int64_t>(torch.get_dim); }
  int64_t numel() const { return get<int64_t>(torch.get_numel); }
  const int64_t* sizes() const { return get<int64_t*>(torch.get_sizes); }
  int32_t type() const { return get<int32_t>(torch.get_dtype); }
  void check_plain(const char* name) const {
    if (get<int32_t>(torch.get_device_type) != torch.device_type_cpu ||
        !get<bool>(torch.is_contiguous))
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

// The tensor of an optional argument, or null. torch passes a pointer to its handle, which the
// callee has to delete.
Handle optional(Value value) {
  if (!value) return nullptr;
  Value* const owned = (Value*)value;
  const Handle handle = (Handle)*owned;
  delete owned;
  return handle;
}

// The layout in a tensor of bytes: X86Layout, then shard_rows.
X86Layout read_layout(const Tensor& bytes, int64_t outputs) {
  bytes.check_plain("the layout");
  const int64_t size = bytes.numel() - int64_t(sizeof(X86Layout));
  if (bytes.type() != torch.dtype_uint8 || size < 0) refuse("this is no layout of x86");
  const char* const data = (const char*)bytes.data();
  X86Layout layout;
  std::memcpy(&layout, data, sizeof layout);
  if (size != layout.shard_count * 8) refuse("this is no layout of x86");
  layout.shard_rows = (const int64_t*)(data + sizeof layout);
  int64_t rows = 0;
  for (int64_t p = 0; p < layout.shard_count; ++p) rows += layout.shard_rows[p];
  if (rows != outputs) refuse(expected("outputs are", outputs, rows));
  return layout;
}

// A new tensor of these sizes, contiguous.
Handle empty(int64_t dimensions, const int64_t* sizes, int32_t type) {
  int64_t strides[kMostDimensions], stride = 1;
  for (int64_t d = dimensions - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;  // as torch computes strides of empty tensors
  }
  Handle made;
  check(torch.empty_strided(dimensions, sizes, strides, type, torch.device_type_cpu, 0, &made));
  return made;
}

void check_packed(const Tensor& packed, const X86Layout& layout) {
  packed.check_plain("the packed weight");
  if (packed.type() != torch.dtype_uint8 || packed.numel() != layout.packed_bytes)
    refuse(expected("bytes of the packed weight are", packed.numel(), layout.packed_bytes));
}

// (x, packed, layout, bias, outputs, isa) -> y. isa: of `supported_isas`, -1 for the last.
void cpu_linear(Value* stack, uint64_t, uint64_t) {
  operator_name = "cpu_linear";
  const Tensor x((Handle)stack[0]), packed((Handle)stack[1]), bytes((Handle)stack[2]);
  const Tensor bias(optional(stack[3]));
  const int64_t outputs = int64_t(stack[4]), wanted = int64_t(stack[5]);
  const SupportedIsas& isas = supported_isas();
  const X86Layout layout = read_layout(bytes, outputs);
  x.check_plain("x");
  check_packed(packed, layout);
  if (wanted >= isas.count || isas.count == 0) refuse("this machine has no such ISA");
  const Isa isa = isas.isas[wanted < 0 ? isas.count - 1 : wanted];
  if (!reads(isa, layout)) refuse("the weight is packed for another ISA");
  const int32_t type = x.type();
  Type kind = kFloat32;
  if (type == torch.dtype_bfloat16) kind = kBfloat16;
  else if (type == torch.dtype_float16) kind = kFloat16;
  else if (type != torch.dtype_float32) refuse("x is not of float32, bfloat16 or float16");
  const int64_t dimensions = x.dimensions();
  if (dimensions < 1 || dimensions > kMostDimensions)
    refuse("x has too few or too many dimensions");
  int64_t sizes[kMostDimensions];
  std::memcpy(sizes, x.sizes(), size_t(dimensions) * sizeof *sizes);
  if (sizes[dimensions - 1] != layout.columns)
    refuse(expected("columns of x are", sizes[dimensions - 1], layout.columns));
  sizes[dimensions - 1] = outputs;
  if (bias) {
    bias.check_plain("the bias");
    if (bias.type() != type) refuse("the bias is not of the type of x");
    if (bias.dimensions() != 1 || bias.numel() != outputs)
      refuse(expected("values of the bias are", bias.numel(), outputs));
  }
  Tensor y(empty(dimensions, sizes, type));
  linear(isa, {&layout,
               (const uint8_t*)packed.data(),
               x.data(),
               bias ? bias.data() : nullptr,
               y.data(),
               x.numel() / layout.columns,
               kind,
               {}});
  stack[0] = (Value)y.release();
}

// (ids, packed, layout, outputs, type, columns) -> y. type: as `Type`.
void cpu_gather_rows(Value* stack, uint64_t, uint64_t) {
  operator_name = "cpu_gather_rows";
  const Tensor ids((Handle)stack[0]), packed((Handle)stack[1]), bytes((Handle)stack[2]);
  const int64_t outputs = int64_t(stack[3]), type = int64_t(stack[4]);
  const X86Layout layout = read_layout(bytes, outputs);
  ids.check_plain("ids");
  check_packed(packed, layout);
  if (ids.type() != torch.dtype_int64) refuse("ids are not of int64");
  if (int64_t(stack[5]) != layout.columns)
    refuse(expected("columns are", int64_t(stack[5]), layout.columns));
  if (type < kFloat32 || type > kFloat16) refuse("there is no such type of the result");
  const int64_t dimensions = ids.dimensions(), count = ids.numel();
  if (dimensions + 1 > kMostDimensions) refuse("ids have too many dimensions");
  const int64_t* const numbers = (const int64_t*)ids.data();
  for (int64_t i = 0; i < count; ++i)
    if (numbers[i] < 0 || numbers[i] >= outputs)
      refuse("id " + std::to_string(numbers[i]) + " is not one of " + std::to_string(outputs) +
             " rows");
  int64_t sizes[kMostDimensions];
  std::memcpy(sizes, ids.sizes(), size_t(dimensions) * sizeof *sizes);
  sizes[dimensions] = layout.columns;
  const int32_t types[] = {torch.dtype_float32, torch.dtype_bfloat16, torch.dtype_float16};
  Tensor y(empty(dimensions + 1, sizes, types[type]));
  gather_rows(layout, (const uint8_t*)packed.data(), numbers, count, Type(type), y.data());
  stack[0] = (Value)y.release();
}

}  // namespace
}  // namespace precalib

// Names of the fields of `Torch`, in order and separated by spaces, for Python to compare with its
// own.
extern "C" EXPORT const char* precalib_torch_fields() {
#define NAME(name, ...) #name " "
  return PRECALIB_TORCH_FUNCTIONS(NAME) PRECALIB_TORCH_CONSTANTS(NAME);
#undef NAME
}

extern "C" EXPORT int64_t precalib_torch_bytes() { return sizeof(precalib::Torch); }

// Registers the operators' implementations for CPUs; 0 for success.
extern "C" EXPORT int32_t precalib_register(const precalib::Torch* functions) {
  using namespace precalib;
  torch = *functions;
  void* library;
  if (int32_t error = torch.library_init_impl("precalib", "CPU", __FILE__, __LINE__, &library))
    return error;
  if (int32_t error = torch.library_impl(library, "cpu_linear", cpu_linear)) return error;
  return torch.library_impl(library, "cpu_gather_rows", cpu_gather_rows);
}
