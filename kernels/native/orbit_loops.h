// The loops of orbit.h for any number of copies: one pass over each copy, with arrays of a block in between.

#pragma once

#include "block.h"

namespace symopt {
namespace {

template <class T> LOOP void add_squares(int64_t n, const T* __restrict g, T* __restrict squares) {
  for (int64_t i = 0; i < n; i++) squares[i] += g[i] * g[i];
}

template <class T> LOOP void accumulate(int64_t n, const T* __restrict squares, T* __restrict second, T share, T beta) {
  for (int64_t i = 0; i < n; i++) second[i] = beta * second[i] + share * squares[i];
}

template <class T> LOOP void raise(int64_t n, const T* __restrict second, T* __restrict peak) {
  for (int64_t i = 0; i < n; i++) peak[i] = second[i] <= peak[i] ? peak[i] : second[i];
}

template <class T> LOOP void add_difference(int64_t n, const T* __restrict x, const T* __restrict y, T* __restrict to) {
  for (int64_t i = 0; i < n; i++) to[i] += y[i] - x[i];
}

// From the first copy on, so that the mean of equal numbers is that number.
template <class T> LOOP void mean_from(int64_t n, const T* __restrict x, T* __restrict to, T share) {
  for (int64_t i = 0; i < n; i++) to[i] = x[i] + share * to[i];
}

template <class T> LOOP void multiply(int64_t n, const T* __restrict x, T* __restrict to, T factor) {
  for (int64_t i = 0; i < n; i++) to[i] = factor * x[i];
}

template <class T>
LOOP void move_if_equal(int64_t n, const T* w_mean, const T* along, const T* u_mean, T* __restrict to) {
  for (int64_t i = 0; i < n; i++) to[i] = w_mean[i] - along[i] * u_mean[i];
}

template <class T> LOOP void copy(int64_t n, const T* from, T* __restrict to) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// Shrink and shift of every orbit's weights under one gate.
template <class T>
LOOP void gate_of_plane(int64_t n, const T* __restrict step_scale, const T* __restrict along, T* __restrict shrink,
                        T* __restrict shift, const Gate& gate, const StepConstants<T>& k) {
  const bool coupled = k.direction == ADAM;
  const T own = T(gate.own), rate = T(gate.t * k.decay_kept), reach = T((1 - gate.own) * gate.square * gate.t);
  for (int64_t i = 0; i < n; i++) {
    // A weight that has no gradient has a decay without bounds; its factor must not overshoot zero.
    T decay = coupled ? rate * step_scale[i] : rate, fits = 1 / larger(decay, T(1));
    decay = smaller(decay, T(1));
    shrink[i] = own * decay - own - decay;
    shift[i] = reach * fits * along[i];
  }
}

// The same where every orbit has a gate of its own.
template <class T>
LOOP void gate_of_orbits(int64_t n, const T* __restrict step_scale, const T* __restrict along, const T* __restrict ww,
                         const T* __restrict uu, const T* __restrict uw, T* __restrict shrink, T* __restrict shift,
                         const StepConstants<T>& k) {
  const bool coupled = k.direction == ADAM, saturated = k.saturated;
  const T c = k.imbalance, scale = k.metric_scale, kept = k.decay_kept;
  for (int64_t i = 0; i < n; i++) {
    T decay = coupled ? kept * step_scale[i] : kept, pull = along[i] * root(uu[i]), metric = root(c * c + 4 * ww[i]);
    T most = saturated ? larger(metric, larger(scale, decay + 2 * pull)) : larger(decay, T(1));
    T t = 1 / most, square = (c + metric) / 2;
    decay = t * decay;
    T own = decay + t * along[i] * uw[i] / larger(square, StepConstants<T>::smallest);
    shrink[i] = own * decay - own - decay;
    shift[i] = (1 - own) * square * t * along[i];
  }
}

template <class T>
LOOP double move_copy(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict w_mean,
                      const T* __restrict u_mean, const T* __restrict along, const T* __restrict shrink,
                      const T* __restrict shift) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) {
    T off = w[i] - w_mean[i], back = shift[i] * (u[i] - u_mean[i]), rest = off + shrink[i] * off - back;
    w[i] = w[i] - along[i] * u_mean[i] + shrink[i] * off - back;
    square += rest * rest;
  }
  return double(square);
}

template <class T>
LOOP void add_products(int64_t n, const T* w, const T* u, const T* w_mean, const T* u_mean, T* __restrict ww,
                       T* __restrict uu, T* __restrict uw) {
  for (int64_t i = 0; i < n; i++) {
    T off = w[i] - w_mean[i], d = u[i] - u_mean[i];
    ww[i] += off * off, uu[i] += d * d, uw[i] += d * off;
  }
}

template <class T>
LOOP void add_rest(int64_t n, const T* w, const T* u, const T* w_mean, const T* u_mean, const T* shrink, const T* shift,
                   T* __restrict rest) {
  for (int64_t i = 0; i < n; i++) {
    T off = w[i] - w_mean[i], x = off + shrink[i] * off - shift[i] * (u[i] - u_mean[i]);
    rest[i] += x * x;
  }
}

// Which orbits snap; sizes of the others go to the tally.
template <class T>
LOOP void find_snaps(int64_t n, const T* __restrict step_scale, const T* __restrict along, const T* __restrict pull_sq,
                     const T* __restrict rest, T* __restrict snaps, const StepConstants<T>& k, Tally& tally) {
  const bool coupled = k.direction == ADAM;
  const T kept = k.decay_kept, snap = T(SNAP) * k.metric_scale;
  T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t i = 0; i < n; i++) {
    T decay = coupled ? kept * step_scale[i] : kept, far = root(rest[i]);
    bool snapped = (far <= snap) & (along[i] * root(pull_sq[i]) < decay);
    snaps[i] = snapped ? T(1) : T(0);
    far = (snapped | !(far <= StepConstants<T>::largest)) ? T(0) : far;
    sum += far, square += far * far;
  }
  tally.add(sum, square, 0);
}

template <class T>
LOOP void move_or_snap(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict w_mean,
                       const T* __restrict u_mean, const T* __restrict along, const T* __restrict shrink,
                       const T* __restrict shift, const T* __restrict snaps) {
  for (int64_t i = 0; i < n; i++) {
    T off = w[i] - w_mean[i], drift = along[i] * u_mean[i];
    T x = w[i] - drift + shrink[i] * off - shift[i] * (u[i] - u_mean[i]), on = w_mean[i] - drift;
    w[i] = snaps[i] != 0 ? on : x;
  }
}

template <class T> LOOP double sum_of_inverses(int64_t n, const T* x) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += 1 / x[i];
  return double(sum);
}

template <class T>
LOOP void add_plane_sums(int64_t n, const T* w, const T* u, const T* w_mean, const T* u_mean, const T* step_scale,
                         PlaneSums& s) {
  constexpr int64_t EXACT = 256;  // as add_sums
  for (int64_t start = 0; start < n; start += EXACT) {
    const int64_t end = n - start < EXACT ? n : start + EXACT;
    T ww = 0, uu = 0, uw = 0, dd = 0, dw = 0, update_sq = 0;
#pragma omp simd reduction(+ : ww, uu, uw, dd, dw, update_sq)
    for (int64_t i = start; i < end; i++) {
      T off = w[i] - w_mean[i], x = u[i] - u_mean[i], d = step_scale[i] * x;
      ww += off * off, uu += x * x, uw += x * off, dd += d * d, dw += d * off, update_sq += u[i] * u[i];
    }
    s.ww += ww, s.uu += uu, s.uw += uw, s.dd += dd, s.dw += dw, s.update_sq += update_sq;
  }
}

template <class T>
LOOP void keep_largest_pull(int64_t n, const T* uu, const T* step_scale, bool scaled, PlaneSums& sums) {
  for (int64_t i = 0; i < n; i++) {
    const double pull = scaled ? double(step_scale[i]) * step_scale[i] * uu[i] : double(uu[i]);
    const double before = sums.largest_pull;
    sums.largest_pull = pull <= before || before != before ? before : pull;  // NaN stays
  }
}

}  // namespace
}  // namespace symopt
