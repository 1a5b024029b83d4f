// Slices of several parameters that share one gate: the move of one parameter.  The survey is that of groups (group.h),
// slice by slice; units_tasks.h adds slices of a unit over the parameters in between.

#pragma once

#include "group.h"

namespace symopt {
namespace {

// w' = w - lr update for weights that belong to no unit and have a second moment each.
template <class T>
LOOP int32_t step_unbound(int64_t n, T* __restrict w, const T* __restrict g, const T* __restrict u,
                          T* __restrict second, T* __restrict peak, const StepConstants<T>& k) {
  const T beta2 = k.beta2, share2 = k.one_minus_beta2, correction1 = k.bias_correction1, eps = k.eps, lr = k.lr;
  const T correction2 = k.bias_correction2;
  int32_t zeros = 0;
  for (int64_t i = 0; i < n; i++) {
    T update = u[i];
    if (second) {
      T v = beta2 * second[i] + share2 * (g[i] * g[i]);
      second[i] = v;
      if (peak) {
        v = v <= peak[i] ? peak[i] : v;
        peak[i] = v;
      }
      update = 1 / (root(v * correction2) + eps) * (update * correction1);
    }
    T x = w[i] - lr * update;
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

// The first of these columns that ends behind `column`.
inline int64_t next_unbound(const UnboundColumns* unbound, int64_t count, int64_t column) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (unbound[middle].end <= column) low = middle + 1;
    else high = middle;
  }
  return low;
}

// `shrink` and `shift` of the units are for w / factor.  Unbound columns are in order.
template <class T>
void move_slices(const Entry& e, const StepConstants<double>& constants, const UnitsPart& part, const Stripe& stripe,
                 int64_t begin, int64_t end, const void* shrink_of, const void* shift_of, const UnboundColumns* unbound,
                 int64_t unbound_count, Tally& tally) {
  const StepConstants<T> k(constants);
  const T *unit_shrink = static_cast<const T*>(shrink_of), *unit_shift = static_cast<const T*>(shift_of);
  const double square = part.factor * part.factor;
  const bool one = stripe.groups == 1, adaptive = k.direction != SGD;
  T shrink[MAX_STRIPE], shift[MAX_STRIPE];  // of the columns, or of the one slice
  for (int64_t j = 0; j < stripe.groups; j++) {
    const int64_t unit = part.index[stripe.group + j];
    const T own_shrink = unit < 0 ? T(1) : unit_shrink[unit];
    const T own_shift = unit < 0 ? T(0) : T(square * double(unit_shift[unit]));
    for (int64_t r = 0; r < (one ? 1 : stripe.run); r++)
      shrink[one ? 0 : j * stripe.run + r] = own_shrink, shift[one ? 0 : j * stripe.run + r] = own_shift;
  }
  Block<T> b;
  const int64_t row_length = e.groups * e.run;
  walk(stripe, begin, end, [&](int64_t at, int64_t n) {
    const int64_t row = at / row_length, column = at % row_length, offset = column - stripe.group * e.run;
    int64_t next = next_unbound(unbound, unbound_count, column);
    const bool any = next < unbound_count && unbound[next].begin < column + n;
    b.recall(e, k, at, n, adaptive && any);
    int32_t zeros = 0;
    for (int64_t i = 0; i < n;) {
      const bool more = next < unbound_count && unbound[next].begin < column + n;
      const int64_t gap = more ? larger(unbound[next].begin - column, i) : n;
      if (gap > i)
        zeros += one ? move_group(gap - i, b.w + i, b.u + i, shrink[0], shift[0])
                     : move_columns(gap - i, b.w + i, b.u + i, shrink + offset + i, shift + offset + i);
      i = gap;
      if (!more) continue;
      const UnboundColumns& columns = unbound[next++];
      const int64_t until = smaller(columns.end - column, n);
      const int64_t place = columns.second + row * columns.stride + column + i - columns.begin;
      T* second = e.second ? static_cast<T*>(e.second) + place : nullptr;
      T* peak = e.peak ? static_cast<T*>(e.peak) + place : nullptr;
      zeros += step_unbound(until - i, b.w + i, b.g + i, b.u + i, second, peak, k);
      i = until;
    }
    tally.zeros += b.close(e, zeros);
  });
}

}  // namespace
}  // namespace symopt
