// ISA dispatch: which copies of the kernels this machine can run, which of them computes a product,
// and with which kernel.
#include "isa_dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#define EXPORT __attribute__((visibility("default")))

namespace precalib {

// Defined by `linear.cpp`, once per ISA. Null where the compiler could not compile that copy.
#define PRECALIB_DECLARE(isa)                                     \
  namespace isa {                                                 \
  [[gnu::weak, gnu::visibility("hidden")]] LinearFunction linear; \
  }
PRECALIB_DECLARE(avx2)
PRECALIB_DECLARE(avx_vnni)
PRECALIB_DECLARE(avx512)
PRECALIB_DECLARE(avx512_vnni)
PRECALIB_DECLARE(avx512_bf16)
PRECALIB_DECLARE(amx)

namespace {

bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAvxVnniBit = 1u << 4;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnniBit);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The operating system must agree before a process may use AMX tiles.
bool tiles_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
  if (!has_avx512_bf16()) return false;
#if defined(PRECALIB_SOFTWARE_TILES)  // for tests on machines without AMX
  return true;
#else
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTiles = 1u << 24, kTileBytes = 1u << 25, kTileBfloats = 1u << 22;
  constexpr unsigned kAll = kTiles | kTileBytes | kTileBfloats;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAll) == kAll && tiles_allowed();
#endif
}

struct IsaEntry {
  const char* name;
  LinearFunction* function;
  bool (*machine_has)();
};
// By `Isa`.
constexpr int64_t kIsaCount = kAmx + 1;
const IsaEntry kIsas[kIsaCount] = {
    {"avx2", avx2::linear, has_avx2},
    {"avx_vnni", avx_vnni::linear, has_avx_vnni},
    {"avx512", avx512::linear, has_avx512},
    {"avx512_vnni", avx512_vnni::linear, has_avx512_vnni},
    {"avx512_bf16", avx512_bf16::linear, has_avx512_bf16},
    {"amx", amx::linear, has_amx},
};

SupportedIsas find_supported() {
  __builtin_cpu_init();
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

bool reads(Isa isa, const X86Layout& layout) {
  return layout.bits < 3 || layout.bits > 4 || bool(layout.nibbles) == bool(kShuffling >> isa & 1);
}

void linear(Isa isa, Call call) {
  if (call.rows == 0) return;
  call.kernel = choose_kernel(*call.layout, isa, call.type, call.rows);
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
  __builtin_cpu_init();
  return (kIsas[isa].function != nullptr) | kIsas[isa].machine_has() << 1;
}

// The kernels for one layout, ISA and dtype of x, by M: entries {first M, last M, kernel} of
// `table`, of which there are at most `capacity`. Returns their number. An unlimited last M is
// INT64_MAX.
extern "C" EXPORT int64_t precalib_kernel_table(const X86Layout* layout, int64_t isa, int64_t type,
                                                int64_t (*table)[3], int64_t capacity) {
  int64_t count = 0, first = 1;
  for (const KernelRule& rule : kKernelTable) {
    const int64_t last = last_m(rule, *layout);
    if (!applies(rule, *layout, isa, type) || last < first || count == capacity) continue;
    table[count][0] = first;
    table[count][1] = last;
    table[count++][2] = rule.kernel;
    if (last == kUnlimited) break;
    first = last + 1;
  }
  return count;
}

extern "C" EXPORT const char* precalib_kernel_name(int64_t kernel) { return kKernelNames[kernel]; }

// Bytes of X86Layout, for Python to compare with its own.
extern "C" EXPORT int64_t precalib_layout_bytes() { return sizeof(X86Layout); }
