// The product by the kernels of one ISA: PRECALIB_ISA names the ISA, and -m flags enable it. This
// file is compiled once per ISA.
#include "linear_gemm_bf16.h"
#include "linear_gemm_int8.h"
#include "linear_gemm_shuffle.h"
#include "linear_gemv_int8.h"
#include "linear_gemv_shuffle.h"

namespace precalib {
namespace {

#if !defined(__AVX512VBMI__)

// x in 8 bits. Without VNNI, entries of a wide range are multiplied as words.
template <int kBits, bool kTrellis>
void run_rounded(const Problem& problem, bool gemv) {
  EntryBytes bytes;
#if !defined(__AVXVNNI__)
  constexpr float kLargest = kLargestSplit<1, int8_t>;
  bytes = EntryBytes::narrow(problem.layout);
  if (bytes.stride == 0)
    return gemv ? choose_gemv_shuffle<kBits, kTrellis, WordProduct<1>>(problem, {}, kLargest)
                : run_gemm_shuffle<kBits, kTrellis, WordProduct<1>>(problem, {}, kLargest);
#endif
  return gemv ? choose_gemv_shuffle<kBits, kTrellis, ByteProduct<1>>(problem, bytes)
              : run_gemm_shuffle<kBits, kTrellis, ByteProduct<1>>(problem, bytes);
}

template <int kBits, bool kTrellis>
void run_shuffle(const Problem& problem) {
  switch (problem.call.kernel) {
    case kGemvInt8x1: return run_rounded<kBits, kTrellis>(problem, true);
#if defined(__AVXVNNI__)
    case kGemvInt8x2: return choose_gemv_shuffle<kBits, kTrellis, ByteProduct<2>>(problem);
    case kGemvInt8x3: return choose_gemv_shuffle<kBits, kTrellis, ByteProduct<3>>(problem);
#else
    case kGemvInt16x1: return choose_gemv_shuffle<kBits, kTrellis, WordProduct<1>>(problem);
    case kGemvInt16x2: return choose_gemv_shuffle<kBits, kTrellis, WordProduct<2>>(problem);
#endif
    case kGemmInt8x1: return run_rounded<kBits, kTrellis>(problem, false);
    case kGemmInt16x1: return run_gemm_shuffle<kBits, kTrellis, WordProduct<1>>(problem);
    default: return run_gemm_fp32<kBits, kTrellis>(problem);
  }
}

#endif

// Runs the kernel that `kernel_table.h` names for the call.
template <int kBits>
void run(const Problem& problem) {
  switch (problem.call.kernel) {
#if defined(__AVX512VBMI__)
    case kGemvInt8x1: return choose_gemv_int8<kBits, 1>(problem);
    case kGemvInt8x2: return choose_gemv_int8<kBits, 2>(problem);
    case kGemvInt8x3: return choose_gemv_int8<kBits, 3>(problem);
    case kGemmInt8x1: return run_gemm_int8<kBits, 1>(problem);
    case kGemmInt8x2: return run_gemm_int8<kBits, 2>(problem);
    case kGemmInt8x3: return run_gemm_int8<kBits, 3>(problem);
#if defined(__AVX512BF16__)
#if !defined(__AMX_BF16__)
    case kGemmBf16Register: return run_gemm_bf16_register<kBits>(problem);
#endif
    case kGemmBf16Unscaled: return run_gemm_bf16_panel<UnscaledPanel<kBits>>(problem);
    case kGemmBf16Dequantized: return run_gemm_bf16_panel<DequantizedPanel<kBits>>(problem);
#endif
    default: std::abort();  // the table names no other kernel for this ISA
#else
    default:
      return problem.layout.trellis ? run_shuffle<kBits, true>(problem)
                                    : run_shuffle<kBits, false>(problem);
#endif
  }
}

}  // namespace

namespace PRECALIB_ISA {

void linear(const Call& call) {
  const Problem problem(call);
  switch (problem.layout.bits) {
    case 2: return run<2>(problem);
    case 3: return run<3>(problem);
    case 4: return run<4>(problem);
    case 5: return run<5>(problem);
  }
}

}  // namespace PRECALIB_ISA
}  // namespace precalib
