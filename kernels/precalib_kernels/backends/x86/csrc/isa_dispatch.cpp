// What Python calls: which levels of instructions this machine has, and a product with one of them.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memory_layout.h"

#define EXPORT __attribute__((visibility("default")))

namespace {

using namespace precalib;

constexpr Run* kLevels[] = {avx2::run, avx512::run, avx512_vnni::run, avx512_bf16::run, amx::run};

// The operating system must agree before a process may use AMX tiles.
bool tiles_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

// The highest level that this machine has, -1 if it has not even AVX2.
extern "C" EXPORT int precalib_level() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return -1;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C)) return -1;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return 0;
  if (!(__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))) return 1;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
#if defined(PRECALIB_SOFTWARE_TILES)  // for tests on machines without AMX
  return 4;
#endif
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 3;
  constexpr unsigned kTiles = 1u << 24, kTileBytes = 1u << 25, kTileBfloats = 1u << 22;
  constexpr unsigned kAll = kTiles | kTileBytes | kTileBfloats;
  return (edx & kAll) == kAll && tiles_allowed() ? 4 : 3;
}

// Bytes of Plan and Call, for Python to compare with its own.
extern "C" EXPORT int64_t precalib_plan_bytes() { return sizeof(Plan); }

// y = x W + bias: [rows, columns] to [rows, sum of part_rows].
extern "C" EXPORT void precalib_linear(const Plan* plan, int64_t level, const void* packed, const void* x,
                                const void* bias, void* y, int64_t rows, int64_t type) {
  kLevels[level](Call{plan, (const uint8_t*)packed, x, bias, y, rows, type});
}
