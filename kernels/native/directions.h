// Directions on blocks of contiguous weights: a gradient and its moments become an update, and Adam's a gain.
//
// The source of each instruction set includes this file and those built on it.  The formulas are those of
// kernels/reference.  m directions and n retractions are m + n functions that meet in a buffer in L1; that is faster
// than one loop per pair, because a single loop's chain of two roots and two divisions is too long for a core to
// overlap.  The compiler vectorizes plain loops; -fopenmp-simd lets it reorder the marked sums and nothing else.

#pragma once

#include "functions.h"

// Out of line: where GCC inlines a loop into a larger function it forgets `restrict`, and then does not vectorize it.
#define LOOP [[gnu::noinline]] static

namespace symopt {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
inline float size(float x) { return __builtin_fabsf(x); }
inline double size(double x) { return __builtin_fabs(x); }
template <class T> inline T larger(T a, T b) { return a > b ? a : b; }
template <class T> inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> inline bool is_finite(T x) { return x - x == 0; }
template <class T> inline void fill(T* to, int64_t n, T x) {
  for (int64_t i = 0; i < n; i++) to[i] = x;
}

// The gradient that a direction takes: unscaled, with its sign, and with torch's coupled weight decay.
template <class T>
LOOP void prepare(int64_t n, const T* g, const T* w, T* to, T factor, T weight_decay) {
  for (int64_t i = 0; i < n; i++) to[i] = factor * g[i] + weight_decay * w[i];
}

template <class T, bool NESTEROV, bool FRESH>
LOOP void sgd(int64_t n, const T* __restrict g, T* __restrict buffer, T* __restrict update, T momentum, T undamped) {
  for (int64_t i = 0; i < n; i++) {
    T b = FRESH ? g[i] : momentum * buffer[i] + undamped * g[i];
    buffer[i] = b;
    if (NESTEROV) update[i] = g[i] + momentum * b;
  }
}

template <class T> LOOP void nesterov_update(int64_t n, const T* g, const T* buffer, T* __restrict update, T momentum) {
  for (int64_t i = 0; i < n; i++) update[i] = g[i] + momentum * buffer[i];
}

template <class T> LOOP void first_moment(int64_t n, const T* __restrict g, T* __restrict exp_avg, T share) {
  for (int64_t i = 0; i < n; i++) exp_avg[i] = exp_avg[i] + share * (g[i] - exp_avg[i]);
}

template <class T, bool AMSGRAD>
LOOP void adam_loop(int64_t n, const T* __restrict g, T* __restrict exp_avg, T* __restrict exp_avg_sq,
                    T* __restrict peak, T* __restrict update, T* __restrict gain, const StepConstants<T>& k) {
  const T share1 = k.one_minus_beta1, beta2 = k.beta2, share2 = k.one_minus_beta2, eps = k.eps;
  const T correction1 = k.bias_correction1, correction2 = k.bias_correction2;
  for (int64_t i = 0; i < n; i++) {
    T m = exp_avg[i] + share1 * (g[i] - exp_avg[i]), v = beta2 * exp_avg_sq[i] + share2 * (g[i] * g[i]);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (AMSGRAD) {
      v = v <= peak[i] ? peak[i] : v;
      peak[i] = v;
    }
    T p = 1 / (root(v * correction2) + eps);
    gain[i] = p;
    update[i] = p * (m * correction1);
  }
}

template <class T>
void adam(int64_t n, const T* g, T* exp_avg, T* exp_avg_sq, T* peak, T* update, T* gain, const StepConstants<T>& k) {
  (peak ? adam_loop<T, true> : adam_loop<T, false>)(n, g, exp_avg, exp_avg_sq, peak, update, gain, k);
}

// The sign of a mean that weighs this gradient more than the stored mean does; NaN where the mean is not finite.
template <class T>
LOOP void lion(int64_t n, const T* __restrict g, T* __restrict exp_avg, T* __restrict update,
               const StepConstants<T>& k) {
  const T beta1 = k.beta1, share1 = k.one_minus_beta1, beta2 = k.beta2, share2 = k.one_minus_beta2;
  for (int64_t i = 0; i < n; i++) {
    T x = beta1 * exp_avg[i] + share1 * g[i];
    exp_avg[i] = beta2 * exp_avg[i] + share2 * g[i];
    update[i] = T(x > 0) - T(x < 0) + (x - x);
  }
}

// Adam's preconditioner of each second moment.
template <class T>
LOOP void precondition(int64_t n, const T* __restrict second, T* __restrict to, const StepConstants<T>& k) {
  const T correction2 = k.bias_correction2, eps = k.eps;
  for (int64_t i = 0; i < n; i++) to[i] = 1 / (root(second[i] * correction2) + eps);
}

// The next second moment of all weights that have the i-th in common, and their preconditioner.
template <class T> double second_moment(const Entry& e, const StepConstants<double>& k, int64_t i, double square) {
  if (k.direction == SGD) return 1;
  T* second = static_cast<T*>(e.second) + i;
  T v = *second = T(k.beta2 * *second + k.one_minus_beta2 * square);
  if (e.peak) {
    T* peak = static_cast<T*>(e.peak) + i;
    v = *peak = v <= *peak ? *peak : v;
  }
  return 1 / (root(double(v) * k.bias_correction2) + k.eps);
}

}  // namespace
}  // namespace symopt
