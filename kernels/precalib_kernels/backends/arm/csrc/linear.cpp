// The product by the kernels of one ISA: PRECALIB_ISA names the ISA, and -march enables it. This
// file is compiled once per ISA.
#include "gemm_int8.h"
#include "gemv_int8.h"

namespace precalib {
namespace {

template <int kBits, bool kTrellis>
void run_kernel(const Problem& problem) {
  switch (problem.call.kernel) {
    case kGemvInt8x1: return choose_gemv_int8<kBits, kTrellis, 1>(problem);
    case kGemvInt8x2: return choose_gemv_int8<kBits, kTrellis, 2>(problem);
    case kGemvInt8x3: return choose_gemv_int8<kBits, kTrellis, 3>(problem);
    case kGemmInt8x1: return run_gemm_int8<kBits, kTrellis, 1>(problem);
    case kGemmInt8x2: return run_gemm_int8<kBits, kTrellis, 2>(problem);
    case kGemmInt8x3: return run_gemm_int8<kBits, kTrellis, 3>(problem);
    default: std::abort();  // `isa_dispatch.cpp` names no other kernel
  }
}

template <int kBits>
void run(const Problem& problem) {
  if (problem.layout.trellis) run_kernel<kBits, true>(problem);
  else run_kernel<kBits, false>(problem);
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
