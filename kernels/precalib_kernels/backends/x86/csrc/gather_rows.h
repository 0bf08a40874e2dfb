// Rows of a packed weight by number, as an embedding needs them: plain C++, as one row is read with
// the stride of its block and its lookups depend on each other.
#pragma once

#include "kernel_table.h"

namespace precalib {

// y[i] = row ids[i] of the weight, rounded to `type`; ids are within the rows.
void gather_rows(const X86Layout& layout, const uint8_t* packed, const int64_t* ids, int64_t count,
                 Type type, void* y);

}  // namespace precalib
