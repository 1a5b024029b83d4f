// The step of weights whose coordinates in a few directions shall vanish: kernels/reference/plane.py for an orthonormal
// basis.
//
// The rows of all directions for one block of weights lie together, so the basis is read as one stream.  All weights
// have one second moment in common.

#pragma once

#include "centred.h"

namespace symopt {
namespace {

template <class T> LOOP double inner(int64_t n, const T* x, const T* y) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return double(sum);
}

template <class T> LOOP void add_direction(int64_t n, T* __restrict w, const T* __restrict direction, T factor) {
  for (int64_t i = 0; i < n; i++) w[i] += factor * direction[i];
}

template <class T>
void survey_basis(const Entry& e, const StepConstants<double>& constants, int64_t begin, int64_t end, int64_t columns,
                  double* sums) {
  const StepConstants<T> k(constants);
  Block<T> b;
  for (int64_t i = begin; i < end; i += BLOCK) {
    const T* basis = static_cast<const T*>(e.factor_0) + i * columns;
    b.open(e, k, i, smaller(end - i, BLOCK)), b.direct(e, k);
    if (k.direction != SGD) sums[0] += inner(b.n, b.g, b.g);
    sums[1] += inner(b.n, b.u, b.u);
    for (int64_t j = 0; j < columns; j++) {
      sums[2 + j] += inner(b.n, basis + j * BLOCK, static_cast<const T*>(b.w));
      sums[2 + columns + j] += inner(b.n, basis + j * BLOCK, b.u);
    }
  }
}

template <class T>
void move_basis(const Entry& e, const StepConstants<double>& constants, int64_t begin, int64_t end, int64_t columns,
                const MeanMove* moves) {
  const StepConstants<T> k(constants);
  Block<T> b;
  const T along = T(moves[0].along);
  for (int64_t i = begin; i < end; i += BLOCK) {
    const T* basis = static_cast<const T*>(e.factor_0) + i * columns;
    b.recall(e, k, i, smaller(end - i, BLOCK));
    drift(b.n, b.w, b.u, along, T(0));
    for (int64_t j = 0; j < columns; j++) add_direction(b.n, b.w, basis + j * BLOCK, T(moves[j].add));
    b.close(e, 0);
  }
}

}  // namespace
}  // namespace symopt
