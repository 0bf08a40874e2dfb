// A product as it is dispatched: to the copy of the kernels that is compiled for an ISA, and in it
// to the kernel that `kernel_table.h` names.
#pragma once

#include "kernel_table.h"

namespace precalib {

struct Call {
  const X86Layout* layout;
  const uint8_t* packed;
  const void* x;  // [rows, columns]
  const void* bias;
  void* y;             // [rows, sum of shard_rows]
  int64_t rows, type;  // rows: the batch size M
  Kernel kernel;
};
using LinearFunction = void(const Call&);

// ISAs that the library was compiled for and this machine has, in ascending order. The first call
// asks the processor, which takes microseconds on a virtual machine.
struct SupportedIsas {
  int64_t count;
  Isa isas[kAmx + 1];
};
const SupportedIsas& supported_isas();

// Whether the kernels of an ISA read codes in the order that this layout has.
bool reads(Isa isa, const X86Layout& layout);

// y = x W + bias. call.kernel is set here.
void linear(Isa isa, Call call);

}  // namespace precalib
