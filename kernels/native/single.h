// The step of a range of single weights: direction and retraction, block by block.

#pragma once

#include "elementwise.h"

namespace symopt {
namespace {

template <class T>
void single(const Entry& e, const StepConstants<double>& constants, int64_t begin, int64_t end, Tally& tally,
            double* sample, int64_t stride) {
  const StepConstants<T> k(constants);
  Block<T> b;
  auto retract = [&]() -> int32_t {
    if (e.retraction == PLAIN) return plain(b.n, b.w, b.u, k);
    if (e.retraction == SPARSE) return sparse(b.n, b.w, b.u, b.gain, k, tally);
    T *factor_0 = static_cast<T*>(e.factor_0) + b.at, *factor_1 = static_cast<T*>(e.factor_1) + b.at;
    split_stale<T>(e.dtype, b.n, b.w, factor_0, factor_1, k.imbalance);
    return sparse_free(b.n, b.w, factor_0, factor_1, b.u, b.gain, k);
  };
  const int64_t whole = e.pattern_m ? BLOCK / e.pattern_m * e.pattern_m : BLOCK;
  for (int64_t i = begin; i < end; i += whole) {
    b.open(e, k, i, smaller(end - i, whole));
    T* first = static_cast<T*>(e.first) + i;
    if (k.direction == SGD) {
      b.direct(e, k);
    } else if (k.direction == LION) {
      lion(b.n, b.g, first, b.update_copy, k);
      b.u = b.update_copy;
    } else {
      T* peak = e.peak ? static_cast<T*>(e.peak) + i : nullptr;
      adam(b.n, b.g, first, static_cast<T*>(e.second) + i, peak, b.update_copy, b.gain, k);
      b.u = b.update_copy;
    }
    if (k.pattern_m) nm_decays(b.n, b.w, b.gain, k.pattern_n, k.pattern_m, k.decay_kept, k.decay_pruned);
    if (sample)
      for (int64_t j = (i + stride - 1) / stride * stride; j < i + b.n; j += stride)
        sample[j / stride] = (k.pattern_m ? T(1) : size(b.w[j - i]) <= k.threshold ? k.decay_pruned : k.decay_kept) *
                             (source(k) != UNIFORM ? b.gain[j - i] : T(1));
    tally.zeros += b.close(e, retract());
  }
}

}  // namespace
}  // namespace symopt
