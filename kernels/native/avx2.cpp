// The step for processors with AVX2, FMA and F16C.

#if defined(__x86_64__)

#include <immintrin.h>

#include "functions.h"
#include "target.h"

#define SYMOPT_F16C
#define SYMOPT_FUSED_COPIES
SYMOPT_TARGET("avx2,fma,f16c")
#include "instructions.h"

namespace symopt {
const Functions avx2_fp32 = functions<float>(), avx2_fp64 = functions<double>();
}  // namespace symopt

SYMOPT_TARGET_END
#endif
