// ISA dispatch on Arm: which copies of the kernels this machine can run, and which kernel computes
// a product. It has the interface of backend x86's, which `torch_binding.cpp` calls, and a C
// function for programs without torch.
#include "../../x86/csrc/isa_dispatch.h"

#include "../../x86/csrc/gather_rows.h"

#include <sys/auxv.h>

#include <cstring>

#define EXPORT __attribute__((visibility("default")))

namespace precalib {

// Defined by `linear.cpp`, once per ISA. Null where the compiler could not compile that copy.
#define PRECALIB_DECLARE(isa)                                     \
  namespace isa {                                                 \
  [[gnu::weak, gnu::visibility("hidden")]] LinearFunction linear; \
  }
PRECALIB_DECLARE(dotprod)
PRECALIB_DECLARE(i8mm)

namespace {

// asm/hwcap.h
constexpr unsigned long kHasDotProduct = 1ul << 20, kHasMatrix = 1ul << 13;

bool has_dotprod() { return getauxval(AT_HWCAP) & kHasDotProduct; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & kHasMatrix); }

struct IsaEntry {
  const char* name;
  LinearFunction* function;
  bool (*machine_has)();
};
// In ascending order; an `Isa` is an index of this.
constexpr int64_t kIsaCount = 2;
const IsaEntry kIsas[kIsaCount] = {
    {"dotprod", dotprod::linear, has_dotprod},
    {"i8mm", i8mm::linear, has_i8mm},
};

constexpr int64_t kMaxGemvRows = 4;

// Two splits of x hold what bfloat16 and float16 have, three what float32 has.
int64_t count_splits(const X86Layout& layout, int64_t type) {
  if (layout.int8_inputs) return 1;
  return type == kFloat32 ? 3 : 2;
}

Kernel choose(const X86Layout& layout, int64_t type, int64_t rows) {
  const Kernel first = rows <= kMaxGemvRows ? kGemvInt8x1 : kGemmInt8x1;
  return Kernel(first + count_splits(layout, type) - 1);
}

SupportedIsas find_supported() {
  SupportedIsas found = {};
  for (int64_t isa = 0; isa < kIsaCount; ++isa)
    if (kIsas[isa].function && kIsas[isa].machine_has()) found.isas[found.count++] = Isa(isa);
  return found;
}

}  // namespace

const SupportedIsas& supported_isas() {
  static const SupportedIsas found = find_supported();
  return found;
}

bool reads(Isa, const X86Layout& layout) { return !layout.nibbles; }

void linear(Isa isa, Call call) {
  if (call.rows == 0) return;
  call.kernel = choose(*call.layout, call.type, call.rows);
  kIsas[isa].function(call);
}

}  // namespace precalib

using namespace precalib;

// The index of an ISA in the library's own table, -1 for a name it does not know.
extern "C" EXPORT int64_t precalib_isa_index(const char* name) {
  for (int64_t isa = 0; isa < kIsaCount; ++isa)
    if (std::strcmp(kIsas[isa].name, name) == 0) return isa;
  return -1;
}

// Bit 0: the library was compiled for this ISA; bit 1: this machine has it.
extern "C" EXPORT int32_t precalib_isa_state(int64_t isa) {
  if (isa < 0 || isa >= kIsaCount) return 0;
  return (kIsas[isa].function != nullptr) | kIsas[isa].machine_has() << 1;
}

// Name of the kernel of a product with `rows` rows of x.
extern "C" EXPORT const char* precalib_kernel_for(const X86Layout* layout, int64_t type,
                                                  int64_t rows) {
  return kKernelNames[choose(*layout, type, rows)];
}

// y = x W + bias for programs without torch. type: `Type`; bias: null for none; isa: of
// `precalib_isa_index`. Returns 0, or 1 if this machine or the library lacks the ISA.
extern "C" EXPORT int32_t precalib_linear(const X86Layout* layout, const uint8_t* packed,
                                          const void* x, const void* bias, void* y, int64_t rows,
                                          int64_t type, int64_t isa) {
  if (precalib_isa_state(isa) != 3) return 1;
  linear(Isa(isa), {layout, packed, x, bias, y, rows, type, {}});
  return 0;
}

// Rows of W by number, for programs without torch. y: [count][columns] of `type`.
extern "C" EXPORT void precalib_gather_rows(const X86Layout* layout, const uint8_t* packed,
                                            const int64_t* ids, int64_t count, int64_t type,
                                            void* y) {
  gather_rows(*layout, packed, ids, count, Type(type), y);
}

// Bytes of X86Layout, for Python to compare with its own.
extern "C" EXPORT int64_t precalib_layout_bytes() { return sizeof(X86Layout); }
