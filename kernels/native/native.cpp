// The constrained step on CPUs: what binding.py calls.
//
// Each instruction set has its own source (baseline.cpp, avx2.cpp, avx512.cpp), which compiles the same headers and
// exports tables of functions (functions.h); the best set that the processor has is chosen when the step runs.

#include <new>

#include "basis_tasks.h"
#include "centred_tasks.h"
#include "layout.h"
#include "orbit_tasks.h"
#include "selection.h"
#include "tensor_tasks.h"
#include "units_tasks.h"

using namespace symopt;

namespace {

// 0, or 1 if memory ran out before anything was changed.
template <class F> int without_memory(const F& f) try {
  f();
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

bool skips(const Settings& s) { return s.found_inf && *s.found_inf != 0; }

}  // namespace

#define SYMOPT_PUBLIC __attribute__((visibility("default")))

extern "C" {

// Bits: 1 avx2, 2 avx512; what this processor has beside the baseline.
SYMOPT_PUBLIC int symopt_instructions() {
#if defined(__x86_64__)
  // No processor has AVX2 without F16C.
  const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 + 2 * avx512;
#else
  return 0;
#endif
}

SYMOPT_PUBLIC const char* symopt_layout() {
  static const std::string all = describe();
  return all.c_str();
}

SYMOPT_PUBLIC int symopt_step_tensors(Entry* const* entries, int64_t count, const Settings* s) {
  return without_memory([&] {
    if (!skips(*s)) step_tensors(entries, count, *s);
  });
}

SYMOPT_PUBLIC int symopt_step_planes(const PlaneEntry* const* entries, int64_t count, const Settings* s) {
  return without_memory([&] {
    if (skips(*s)) return;
    std::vector<std::unique_ptr<PlaneWork>> works;
    for (const PlaneEntry* const* at = entries; at != entries + count; at++)
      if ((*at)->centred) works.emplace_back(new CentredWork(*at, *s));
      else if ((*at)->columns) works.emplace_back(new BasisWork(*at, *s));
      else works.emplace_back(new OrbitWork(*at, *s));
    for (auto& w : works) step_plane(*w, *s);
  });
}

SYMOPT_PUBLIC int symopt_survey_units(const UnitsEntry* const* entries, int64_t count, const Settings* s) {
  return without_memory([&] {
    if (!skips(*s)) survey_units(entries, count, *s);
  });
}

SYMOPT_PUBLIC int symopt_move_units(const UnitsEntry* const* entries, int64_t count, const Settings* s) {
  return without_memory([&] {
    if (!skips(*s)) move_units(entries, count, *s);
  });
}

SYMOPT_PUBLIC void symopt_histogram(const float* x, int64_t numel, int64_t* counts) { histogram(x, numel, counts); }

SYMOPT_PUBLIC int symopt_rank(const float* x, int64_t numel, const int64_t* counts, int64_t k, float* found) {
  return without_memory([&] { *found = rank(x, numel, counts, k); });
}

SYMOPT_PUBLIC int symopt_shares(const int64_t* const* counts, int64_t tensors, int64_t budget, double far,
                                double rounding, int64_t* live) {
  return without_memory([&] { shares(counts, tensors, budget, far, rounding, live); });
}

}  // extern "C"
