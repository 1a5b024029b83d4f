// The step of weights whose means over groups shall vanish: kernels/reference/plane.py where what is off the plane is
// one number per group.
//
// The gate needs its sums before any weight can move, so there are two sweeps: the survey (group.h) advances the
// moments and adds up, the move writes the weights.  A few numbers per group are decided in between.  Groups that are
// on the plane already move at once, as if they were to stay there.

#pragma once

#include "group.h"

namespace symopt {
namespace {

// From sums of `parts` parts, `size` apart (g^2, u, w, u^2): the means and second moments of the stripe's groups, and
// what the gate needs.
template <class T>
void combine_means(const Entry& e, const StepConstants<double>& k, const Stripe& stripe, double* sums, int64_t parts,
                   int64_t size, Mean* to, PlaneSums& all) {
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[p * size + i];
  const int64_t run = stripe.groups == 1 ? 1 : stripe.run, pitch = stripe.groups == 1 ? 1 : stripe.width;
  const double count = double(stripe.rows) * double(stripe.run);
  for (int64_t j = 0; j < stripe.groups; j++) {
    double s[4] = {0, 0, 0, 0};
    for (int q = 0; q < 4; q++)
      for (int64_t r = 0; r < run; r++) s[q] += sums[q * pitch + j * run + r];
    const Mean found = {s[2] / count, s[1] / count, second_moment<T>(e, k, stripe.group + j, s[0] / count)};
    to[stripe.group + j] = found;
    add(all, found, count);
    all.update_sq += s[3], all.sum_inverse += count / found.step_scale;
  }
}

// w' = w - along u + add.
template <class T> LOOP void drift(int64_t n, T* __restrict w, const T* __restrict u, T along, T add) {
  for (int64_t i = 0; i < n; i++) w[i] = w[i] - along * u[i] + add;
}

template <class T>
LOOP void drift_columns(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict along,
                        const T* __restrict add) {
  for (int64_t i = 0; i < n; i++) w[i] = w[i] - along[i] * u[i] + add[i];
}

template <class T>
void move_means(const Entry& e, const StepConstants<double>& constants, const Stripe& stripe, int64_t begin,
                int64_t end, const MeanMove* moves) {
  const StepConstants<T> k(constants);
  Block<T> b;
  T along[MAX_STRIPE], add[MAX_STRIPE];
  const bool one = stripe.groups == 1;
  for (int64_t j = 0; j < stripe.groups; j++)
    for (int64_t r = 0; r < (one ? 1 : stripe.run); r++) {
      const int64_t i = one ? 0 : j * stripe.run + r;
      along[i] = T(moves[stripe.group + j].along), add[i] = T(moves[stripe.group + j].add);
    }
  walk(stripe, begin, end, [&](int64_t at, int64_t n) {
    b.recall(e, k, at, n);
    const int64_t column = one ? 0 : (at - stripe.base) % stripe.row_stride;
    if (one) drift(n, b.w, b.u, along[0], add[0]);
    else drift_columns(n, b.w, b.u, along + column, add + column);
    b.close(e, 0);
  });
}

}  // namespace
}  // namespace symopt
