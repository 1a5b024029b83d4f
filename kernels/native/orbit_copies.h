// The sweeps of orbit.h for two to four copies, each in one loop without arrays in between: a dozen streams that start
// at the same offset of their pages conflict in a cache of eight ways, and arrays would add to them.  Where memory is
// fast these loops wait for roots and divisions, so each result of one is used as often as possible.

#pragma once

#include "block.h"

#define EACH_COPY _Pragma("GCC unroll 4") for (int j = 0; j < N; j++)

namespace symopt {
namespace {

// Where the updates of the survey come from; those that are GIVEN are only read.
enum Updates { GIVEN, MOMENTUM, NESTEROV, MOMENTS, AMSGRAD };

constexpr bool is_adaptive(Updates updates) { return updates == MOMENTS || updates == AMSGRAD; }

template <class T, int N> struct Copies {
  const T* g[N];
  T *u[N], *w[N];
};

template <int N> constexpr int WHOLE = N == 2 ? 2 : 1;

// The mean, and what is off it.  From the first copy on, so that the mean of equal numbers is that number.
template <class T, int N> inline T center(const T (&x)[N], T (&off)[N]) {
  if constexpr (N == 2) {
    off[1] = T(0.5) * (x[1] - x[0]), off[0] = -off[1];
    return x[0] + off[1];
  }
  T sum = 0;
  EACH_COPY sum += x[j] - x[0];
  const T mean = x[0] + T(1) / N * sum;
  EACH_COPY off[j] = x[j] - mean;
  return mean;
}

// An inner product of two such parts is WHOLE times this.
template <class T, int N> inline T dot(const T (&a)[N], const T (&b)[N]) {
  if constexpr (N == 2) return a[1] * b[1];
  T sum = 0;
  EACH_COPY sum += a[j] * b[j];
  return sum;
}

// The length of such a part; for two copies without a root.
template <class T, int N> inline T length(const T (&off)[N]) {
  return N == 2 ? T(1.4142135623730951) * size(off[1]) : root(dot(off, off));
}

// Numbers of the moments, by value: else compilers load them again after every store.
template <class T, int N> struct Rates {
  T share1, beta2, share2, correction2, eps, momentum, undamped;
  explicit Rates(const StepConstants<T>& k)
      : share1(k.one_minus_beta1), beta2(k.beta2), share2(k.one_minus_beta2 / N), correction2(k.bias_correction2),
        eps(k.eps), momentum(k.momentum), undamped(k.undamped) {}
};

// The copies of an orbit and their updates, once the moments are advanced; returns what Adam divides by, else 1.
template <class T, int N, Updates UPDATES>
inline T advance(int64_t i, const Copies<T, N>& c, T* second, T* peak, const Rates<T, N>& r, T (&w)[N], T (&x)[N]) {
  EACH_COPY w[j] = c.w[j][i], x[j] = c.u[j][i];
  if (UPDATES == MOMENTUM || UPDATES == NESTEROV) EACH_COPY {
      x[j] = r.momentum * x[j] + r.undamped * c.g[j][i];
      c.u[j][i] = x[j];
      if (UPDATES == NESTEROV) x[j] = c.g[j][i] + r.momentum * x[j];
    }
  if (!is_adaptive(UPDATES)) return 1;
  T squares = 0;
  EACH_COPY {
    T g = c.g[j][i];
    x[j] = x[j] + r.share1 * (g - x[j]);
    c.u[j][i] = x[j];
    squares += g * g;
  }
  T v = r.beta2 * second[i] + r.share2 * squares;
  second[i] = v;
  if (UPDATES == AMSGRAD) {
    v = v <= peak[i] ? peak[i] : v;
    peak[i] = v;
  }
  return root(v * r.correction2) + r.eps;
}

// The largest pull of a single orbit, squared; NaN stays.
template <int N> void keep_largest(PlaneSums& s, double largest, double nan_or_finite) {
  if (s.largest_pull != s.largest_pull) return;
  const double found = WHOLE<N> * largest;
  s.largest_pull = nan_or_finite != nan_or_finite ? nan_or_finite : s.largest_pull < found ? found : s.largest_pull;
}

// The survey of one block; `on` takes what the weights become if they are equal.  Returns how many are not.
template <class T, int N, Updates UPDATES>
LOOP int32_t survey_copies(int64_t n, const Copies<T, N> c, T* second, T* peak, T* on, const StepConstants<T>& k,
                           PlaneSums& s) {
  constexpr bool adaptive = is_adaptive(UPDATES);
  const Rates<T, N> rates(k);
  const T reach = k.lr * k.bias_correction1, decoupled = k.direction == ADAMW ? T(1) : T(0);
  T ww = 0, uu = 0, uw = 0, dd = 0, dw = 0, update_sq = 0, sum_inverse = 0, largest = 0;
  int32_t differing = 0;
#pragma omp simd reduction(+ : ww, uu, uw, dd, dw, update_sq, sum_inverse, differing) reduction(max : largest)
  for (int64_t i = 0; i < n; i++) {
    T w[N], x[N], inverse = advance<T, N, UPDATES>(i, c, second, peak, rates, w, x), p = adaptive ? 1 / inverse : T(1);
    sum_inverse += inverse;
    T a[N], b[N], d[N], w_mean = center(w, a), u_mean = center(x, b), pull = dot(b, b);
    EACH_COPY d[j] = p * b[j];  // not p squared, which overflows earlier
    const T drive = dot(d, d);
    EACH_COPY differing += j > 0 && w[j] != w[0], update_sq += x[j] * x[j];
    ww += dot(a, a), uu += pull, uw += dot(a, b), dd += drive, dw += dot(a, d);
    largest = larger(decoupled * drive + (1 - decoupled) * pull, largest);
    on[i] = w_mean - reach * p * u_mean;
  }
  constexpr int whole = WHOLE<N>;
  s.ww += whole * ww, s.uu += whole * uu, s.uw += whole * uw, s.dd += whole * dd, s.dw += whole * dw;
  s.update_sq += update_sq, s.sum_inverse += sum_inverse;
  keep_largest<N>(s, largest, dd);
  return differing;
}

// The move under one gate; returns the squared distance from the plane.
template <class T, int N, bool ADAPTIVE>
LOOP double move_copies(int64_t n, const Copies<T, N> c, const T* second, const Gate& gate, bool moved,
                        const StepConstants<T>& k) {
  const T correction2 = k.bias_correction2, eps = k.eps, own = T(gate.own), rate = T(gate.t * k.decay_kept);
  const bool coupled = ADAPTIVE && k.direction == ADAM;
  // A weight that has no gradient has a decay without bounds; its factor must not overshoot zero.
  const T most = 1 / rate, fits = coupled ? T(1) : 1 / larger(rate, T(1)), reach = k.lr * k.bias_correction1;
  const T back = T((1 - gate.own) * gate.square * gate.t) * reach * fits, along = moved ? T(0) : reach;
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) {
    T w[N], x[N], a[N], b[N], p = ADAPTIVE ? 1 / (root(second[i] * correction2) + eps) : T(1);
    T decay = smaller(coupled ? rate * p : rate, T(1)), shrink = own * decay - own - decay;
    EACH_COPY w[j] = c.w[j][i], x[j] = c.u[j][i];
    center(w, a);
    T u_mean = center(x, b), shift = back * (coupled ? smaller(p, most) : p), drift = along * p * u_mean;
    EACH_COPY {
      b[j] = shrink * a[j] - shift * b[j];
      a[j] += b[j];
      c.w[j][i] = w[j] - drift + b[j];
    }
    square += dot(a, a);
  }
  return WHOLE<N> * double(square);
}

// The only sweep where every orbit has its own gate; returns how many weights differ.  BALANCED: the imbalance is 0,
// the metric 2 |w|.
template <class T, int N, Updates UPDATES, bool BALANCED>
LOOP int32_t step_copies_by_orbit(int64_t n, const Copies<T, N> c, T* second, T* peak, const StepConstants<T>& k,
                                  PlaneSums& s, Tally& tally) {
  constexpr bool adaptive = is_adaptive(UPDATES);
  const Rates<T, N> rates(k);
  const T imbalance = k.imbalance, scale = k.metric_scale;
  const T kept = k.decay_kept, reach = k.lr * k.bias_correction1, snap = T(SNAP) * scale;
  const bool coupled = adaptive && k.direction == ADAM;
  const T decoupled = k.direction == ADAMW ? T(1) : T(0);
  // Without the time scale, t is 1 over the larger of decay and 1, by the same formula: GCC does not vectorize a
  // branch.
  const T scaled = k.saturated ? 1 : 0, twice = 2 * scaled, least = k.saturated ? scale : T(1);
  T sum = 0, squares = 0, update_sq = 0, largest = 0, drives = 0;
  int32_t differing = 0;
#pragma omp simd reduction(+ : sum, squares, update_sq, drives, differing) reduction(max : largest)
  for (int64_t i = 0; i < n; i++) {
    T w[N], x[N], inverse = advance<T, N, UPDATES>(i, c, second, peak, rates, w, x), p = adaptive ? 1 / inverse : T(1);
    T a[N], b[N], d[N], w_mean = center(w, a), u_mean = center(x, b), norm = length(a), along = reach * p;
    EACH_COPY differing += j > 0 && w[j] != w[0], d[j] = p * b[j], update_sq += x[j] * x[j];
    const T drive = dot(d, d);
    drives += drive;
    largest = larger(decoupled * drive + (1 - decoupled) * dot(b, b), largest);
    T decay = coupled ? kept * p : kept, pull = reach * length(d);
    T metric = BALANCED ? 2 * norm : root(imbalance * imbalance + 4 * WHOLE<N> * dot(a, a));
    T square = BALANCED ? norm : (imbalance + metric) / 2;
    T t = 1 / larger(scaled * metric, larger(least, decay + twice * pull));
    // <x, off> / square.  For two balanced copies that is the part of x that points away from the plane.
    T radial = N == 2 && BALANCED ? T(1.4142135623730951) * (T(a[1] > 0) - T(a[1] < 0)) * b[1]
                                  : WHOLE<N> * dot(a, b) / larger(square, StepConstants<T>::smallest);
    T own = t * decay + t * along * radial, rate = t * decay, shrink = own * rate - own - rate;
    T shift = (1 - own) * square * (t * along), drift = along * u_mean;
    EACH_COPY {
      b[j] = shrink * a[j] - shift * b[j];
      a[j] += b[j];
    }
    T far = length(a), on = w_mean - drift;
    bool snapped = (far <= snap) & (pull < decay);
    EACH_COPY c.w[j][i] = snapped ? on : w[j] - drift + b[j];
    far = (snapped | !(far <= StepConstants<T>::largest)) ? T(0) : far;
    sum += far, squares += far * far;
  }
  tally.add(sum, squares, 0);
  s.update_sq += update_sq;
  keep_largest<N>(s, largest, drives);
  return differing;
}

}  // namespace
}  // namespace symopt

#undef EACH_COPY
