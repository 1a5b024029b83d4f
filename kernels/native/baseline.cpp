// The step for every processor of an architecture.

#include "functions.h"

#ifndef __x86_64__  // where there is nothing better
#define SYMOPT_FUSED_COPIES
#endif

#include "instructions.h"

namespace symopt {
const Functions baseline_fp32 = functions<float>(), baseline_fp64 = functions<double>();
}  // namespace symopt
