// The step for processors with AVX-512 (F, BW, VL, DQ); fp32 and what is stored in half precision.

#if defined(__x86_64__)

#include <immintrin.h>

#include "functions.h"
#include "target.h"

#define SYMOPT_F16C
#define SYMOPT_FUSED_COPIES
SYMOPT_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" SYMOPT_WIDE)
#include "elementwise.h"
#include "avx512.h"
#include "instructions.h"

namespace symopt {
const Functions avx512_fp32 = functions<float>();
}  // namespace symopt

SYMOPT_TARGET_END
#endif
