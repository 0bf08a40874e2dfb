// Which kernel computes y = x W, by ISA, dtype of x, kind of weights and batch size M: the table
// that products are dispatched by and that Python reads.
#pragma once

#include "memory_layout.h"

namespace precalib {

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Isa : int64_t { kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

// x1, x2, x3: splits of x, see `quantize_activations.h`.
enum Kernel : int64_t {
  kGemmFp32,
  kGemvInt16x1,
  kGemvInt16x2,
  kGemmInt16x1,
  kGemvInt8x1,
  kGemvInt8x2,
  kGemvInt8x3,
  kGemmInt8x1,
  kGemmInt8x2,
  kGemmInt8x3,
  kGemmBf16Register,
  kGemmBf16Unscaled,
  kGemmBf16Dequantized,
};
constexpr const char* kKernelNames[] = {
    "gemm_fp32",
    "gemv_int16x1",
    "gemv_int16x2",
    "gemm_int16x1",
    "gemv_int8x1",
    "gemv_int8x2",
    "gemv_int8x3",
    "gemm_int8x1",
    "gemm_int8x2",
    "gemm_int8x3",
    "gemm_bf16_register",
    "gemm_bf16_unscaled",
    "gemm_bf16_dequantized",
};

constexpr int64_t kMaxGemvRows = 4;
constexpr int64_t kMaxInt8RegisterRows = 8;   // two splits, without AMX
constexpr int64_t kMaxBf16RegisterRows = 16;  // without AMX
constexpr int64_t kMaxUniformInt8Rows = 32;   // bfloat16 x, uniform grid
constexpr int64_t kMaxUnscaledRows = 48;      // bfloat16 x, codebook
constexpr int64_t kUnlimited = INT64_MAX;
constexpr int64_t kMaxExactGroup = 512;  // columns of a sum of products of int16 that is exact

struct KernelRule {
  unsigned isas, types;    // bit masks
  int uniform;             // 1: uniform grids, 0: codebooks, -1: both
  int int8_activations;    // 1: x may be rounded to 8 bits, 0: it may not, -1: both
  int64_t last_m;          // for M up to this,
  int64_t group_quarters;  // and up to so many quarters of a group, unless 0,
  Kernel kernel;
};

constexpr unsigned kWithoutVnni = 1u << kAvx2 | 1u << kAvx512;
constexpr unsigned kAvxVnniOnly = 1u << kAvxVnni;
constexpr unsigned kShuffling = kWithoutVnni | kAvxVnniOnly;  // without VBMI
constexpr unsigned kWithVnni = 1u << kAvx512Vnni | 1u << kAvx512Bf16 | 1u << kAmx;
constexpr unsigned kBf16Only = 1u << kAvx512Bf16;
constexpr unsigned kWithBf16 = 1u << kAvx512Bf16 | 1u << kAmx;
constexpr unsigned kF32 = 1u << kFloat32, kBf16 = 1u << kBfloat16, kF16 = 1u << kFloat16;
constexpr unsigned kAnyType = kF32 | kBf16 | kF16;

// The first rule that applies is taken.
constexpr KernelRule kKernelTable[] = {
    // isas, types of x, uniform, int8 x, last M, quarters of a group, kernel
    {kAvxVnniOnly, kBf16 | kF16, -1, 0, kMaxGemvRows, 0, kGemvInt8x2},
    {kAvxVnniOnly, kF32, -1, 0, kMaxGemvRows, 0, kGemvInt8x3},
    {kShuffling, kAnyType, -1, 1, kMaxGemvRows, 0, kGemvInt8x1},
    {kShuffling, kAnyType, -1, 1, kUnlimited, 0, kGemmInt8x1},
    {kWithoutVnni, kBf16 | kF16, -1, 0, kMaxGemvRows, 0, kGemvInt16x1},
    {kWithoutVnni, kF32, -1, 0, kMaxGemvRows, 0, kGemvInt16x2},
    {kShuffling, kBf16 | kF16, -1, 0, kUnlimited, 0, kGemmInt16x1},
    {kShuffling, kAnyType, -1, 0, kUnlimited, 0, kGemmFp32},

    {kWithVnni, kAnyType, -1, 1, kMaxGemvRows, 0, kGemvInt8x1},
    {kWithVnni, kAnyType, -1, 1, kUnlimited, 0, kGemmInt8x1},

    {kWithVnni, kF32, -1, 0, kMaxGemvRows, 0, kGemvInt8x3},
    {kWithVnni, kF32, -1, 0, kUnlimited, 0, kGemmInt8x3},

    {kWithVnni, kBf16 | kF16, -1, 0, kMaxGemvRows, 0, kGemvInt8x2},
    {kBf16Only, kBf16, -1, 0, kMaxInt8RegisterRows, 0, kGemmInt8x2},
    {kBf16Only, kBf16, -1, 0, kMaxBf16RegisterRows, 0, kGemmBf16Register},
    // A group's sums are scaled once per row of x, its weights once: that pays for large M.
    {kWithBf16, kBf16, 1, 0, kMaxUniformInt8Rows, 1, kGemmInt8x2},
    {kWithBf16, kBf16, 0, 0, kMaxUnscaledRows, 3, kGemmBf16Unscaled},
    {kWithBf16, kBf16, -1, 0, kUnlimited, 0, kGemmBf16Dequantized},
    {kWithVnni, kBf16 | kF16, -1, 0, kUnlimited, 0, kGemmInt8x2},
};

inline bool adds_words(Kernel kernel) {
  return kernel == kGemvInt16x1 || kernel == kGemvInt16x2 || kernel == kGemmInt16x1;
}

inline bool applies(const KernelRule& rule, const X86Layout& layout, int64_t isa, int64_t type) {
  const bool uniform = layout.uniform, int8 = layout.int8_inputs;
  return (rule.isas >> isa & 1) && (rule.types >> type & 1) &&
         (rule.uniform < 0 || rule.uniform == uniform) &&
         (rule.int8_activations < 0 || rule.int8_activations == int8) &&
         (!adds_words(rule.kernel) || layout.group_size <= kMaxExactGroup);
}

inline int64_t last_m(const KernelRule& rule, const X86Layout& layout) {
  if (rule.group_quarters == 0) return rule.last_m;
  const int64_t of_group = layout.group_size * rule.group_quarters / 4;
  return rule.last_m < of_group ? rule.last_m : of_group;
}

inline Kernel choose_kernel(const X86Layout& layout, int64_t isa, int64_t type, int64_t m) {
  const KernelRule* rule = kKernelTable;
  while (!applies(*rule, layout, isa, type) || m > last_m(*rule, layout)) ++rule;
  return rule->kernel;
}

}  // namespace precalib
