// Retractions of single weights.

#pragma once

#include "block.h"

namespace symopt {
namespace {

// Each returns how many weights are zero now; `sparse` also adds up their sizes, for the imbalance law.

template <class T>
LOOP int32_t plain(int64_t n, T* __restrict w, const T* __restrict update, const StepConstants<T>& k) {
  const T rho = 1 - k.decay_kept, lr = k.lr;
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = rho * w[i] - lr * update[i];
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

template <class T> void add_finite(int64_t n, const T* w, Tally& tally) {
  for (int64_t i = 0; i < n; i++)
    if (size(w[i]) <= StepConstants<T>::largest) tally.add(size(w[i]), w[i] * w[i], 0);
}

inline int32_t index_like(float) { return 0; }
inline int64_t index_like(double) { return 0; }

// nm_decays for M = 4: one vector holds four neighbours, and its rotations bring each to the others (2:4 on AVX2: an
// eighth of the time).
template <class T>
LOOP void nm_decays_of_four(int64_t n, const T* __restrict w, T* __restrict decays, int pattern_n, T kept, T pruned) {
  typedef decltype(index_like(T())) Index;
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  typedef Index Lanes __attribute__((vector_size(4 * sizeof(T))));
#if defined(__clang__)
#define SYMOPT_ROTATE(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#else
#define SYMOPT_ROTATE(x, a, b, c, d) __builtin_shuffle(x, Lanes{a, b, c, d})
#endif
  const Lanes most = Lanes{} + Index(pattern_n);
  const Four if_kept = Four{} + kept, if_pruned = Four{} + pruned;
  for (int64_t i = 0; i < n; i += 4) {
    Four x;
    __builtin_memcpy(&x, w + i, sizeof x);
    const Four mine = x < 0 ? -x : x;
    const Four next = SYMOPT_ROTATE(mine, 1, 2, 3, 0), far = SYMOPT_ROTATE(mine, 2, 3, 0, 1);
    const Four last = SYMOPT_ROTATE(mine, 3, 0, 1, 2);
    // True is -1 in a lane; of equal neighbours the earlier one counts as larger.
    const Lanes ahead = (next > mine) + (far > mine) + (last > mine) + ((next == mine) & Lanes{0, 0, 0, -1}) +
                        ((far == mine) & Lanes{0, 0, -1, -1}) + ((last == mine) & Lanes{0, -1, -1, -1});
    const Four decay = -ahead < most ? if_kept : if_pruned;
    __builtin_memcpy(decays + i, &decay, sizeof decay);
  }
#undef SYMOPT_ROTATE
}

// N:M: the decays of n weights, `pruned` for all but the N largest of every M neighbours; of equal sizes the
// earlier one is larger.
template <class T>
LOOP void nm_decays(int64_t n, const T* __restrict w, T* __restrict decays, int pattern_n, int pattern_m, T kept,
                    T pruned) {
  if (pattern_m == 4) return nm_decays_of_four(n, w, decays, pattern_n, kept, pruned);
  for (int64_t i = 0; i < n; i += pattern_m)
    for (int j = 0; j < pattern_m; j++) {
      int larger_ones = 0;
      for (int l = 0; l < pattern_m; l++) {
        T mine = size(w[i + j]), other = size(w[i + l]);
        larger_ones += (other > mine) | ((other == mine) & (l < j));
      }
      decays[i + j] = larger_ones < pattern_n ? kept : pruned;
    }
}

// Where a weight's decay comes from: the threshold alone, times the preconditioner in `gain`, or nm_decays, via `gain`.
enum Source { UNIFORM, COUPLED, PATTERN };

template <class T> Source source(const StepConstants<T>& k) {
  return k.pattern_m ? PATTERN : k.direction == ADAM ? COUPLED : UNIFORM;
}

template <class T, Source SOURCE, bool SATURATED>
LOOP int32_t sparse_loop(int64_t n, T* __restrict w, const T* __restrict update, const T* __restrict gain,
                         const StepConstants<T>& k, Tally& tally) {
  const T lr = k.lr, kept = k.decay_kept, pruned = k.decay_pruned, threshold = k.threshold, scale = k.metric_scale;
  const T square_c = k.imbalance * k.imbalance, snap = T(SNAP) * scale, most = k.snap_limit;
  T sum = 0, square = 0;
  int32_t zeros = 0;
#pragma omp simd reduction(+ : sum, square, zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = w[i], delta = lr * update[i], decay = size(x) <= threshold ? pruned : kept;
    if (SOURCE == COUPLED) decay = decay * gain[i];
    if (SOURCE == PATTERN) decay = gain[i];
    bool may_snap = SOURCE == PATTERN ? decay == pruned : size(x) <= most;
    T old = x, pull = size(delta), metric = root(square_c + (x + x) * (x + x));
    T limit = ((pull < decay) & may_snap) ? snap : T(0), least = may_snap ? T(0) : smaller(snap, size(x));
    T t = SATURATED ? 1 / larger(metric, larger(scale, decay + 2 * pull)) : 1 / larger(decay, T(1));
    delta = t * delta;
    T rho = 1 - t * decay;
    x = (rho * rho + delta * delta) * x - rho * delta * metric;
    x = size(x) < least ? old : x;  // what lives within a budget does not vanish
    T far = size(x);
    sum += far;
    square += far * far;
    zeros += far <= limit;
    w[i] = far <= limit ? T(0) : x;
  }
  if (square <= StepConstants<T>::largest) tally.add(sum, square, 0);
  else add_finite(n, w, tally);
  return zeros;
}

template <class T>
int32_t sparse(int64_t n, T* w, const T* update, const T* gain, const StepConstants<T>& k, Tally& tally) {
  const Source from = source(k);
  auto loop = from == COUPLED   ? (k.saturated ? sparse_loop<T, COUPLED, true> : sparse_loop<T, COUPLED, false>)
              : from == PATTERN ? (k.saturated ? sparse_loop<T, PATTERN, true> : sparse_loop<T, PATTERN, false>)
                                : (k.saturated ? sparse_loop<T, UNIFORM, true> : sparse_loop<T, UNIFORM, false>);
  return loop(n, w, update, gain, k, tally);
}

// With REBALANCE every a^2 - b^2 is first multiplied by the imbalance factor at the same product, in closed form.
template <class T, Source SOURCE, bool SATURATED, bool REBALANCE>
LOOP int32_t sparse_free_loop(int64_t n, T* __restrict w, T* __restrict factor_0, T* __restrict factor_1,
                              const T* __restrict update, const T* __restrict gain, const StepConstants<T>& k) {
  const T lr = k.lr, kept = k.decay_kept, pruned = k.decay_pruned, threshold = k.threshold, scale = k.metric_scale;
  const T snap = T(SNAP) * scale, imbalance_factor = k.imbalance_factor, most = k.snap_limit;
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T stored_a = factor_0[i], stored_b = factor_1[i], old = w[i], a = stored_a, b = stored_b;
    if (REBALANCE) {
      T product = size(a * b), c = imbalance_factor * ((a - b) * (a + b));
      T high = root((size(c) + root(c * c + 4 * product * product)) / 2), low = high > 0 ? product / high : T(0);
      T new_a = c >= 0 ? high : low, new_b = c >= 0 ? low : high;
      a = a < 0 ? -new_a : new_a;
      b = b < 0 ? -new_b : new_b;
    }
    T delta = lr * update[i], decay = size(old) <= threshold ? pruned : kept;
    if (SOURCE == COUPLED) decay = decay * gain[i];
    if (SOURCE == PATTERN) decay = gain[i];
    bool may_snap = SATURATED & (SOURCE == PATTERN ? decay == pruned : size(old) <= most);
    T pull = size(delta), limit = ((pull < decay) & may_snap) ? snap : T(-1);
    T t = SATURATED ? 1 / larger(b * b + a * a, larger(scale, decay + 2 * pull)) : 1 / larger(decay, T(1));
    delta = t * delta;
    T rho = 1 - t * decay, u = rho * a - delta * b, v = rho * b - delta * a, x = u * v;
    bool snapped = size(x) <= limit, light = size(u) <= size(v), still = (u == a) & (v == b);
    u = still ? stored_a : u;
    v = still ? stored_b : v;
    factor_0[i] = (snapped & light) ? T(0) : u;
    factor_1[i] = (snapped & !light) ? T(0) : v;
    x = still ? old : x;
    x = snapped ? T(0) : x;
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

template <class T, Source SOURCE>
int32_t sparse_free_as(int64_t n, T* w, T* factor_0, T* factor_1, const T* update, const T* gain,
                       const StepConstants<T>& k) {
  const bool rebalance = k.imbalance_factor >= 0;
  auto loop = k.saturated
                  ? (rebalance ? sparse_free_loop<T, SOURCE, true, true> : sparse_free_loop<T, SOURCE, true, false>)
                  : (rebalance ? sparse_free_loop<T, SOURCE, false, true> : sparse_free_loop<T, SOURCE, false, false>);
  return loop(n, w, factor_0, factor_1, update, gain, k);
}

template <class T>
int32_t sparse_free(int64_t n, T* w, T* factor_0, T* factor_1, const T* update, const T* gain,
                    const StepConstants<T>& k) {
  const Source from = source(k);
  auto as = from == COUPLED ? sparse_free_as<T, COUPLED> : from == PATTERN ? sparse_free_as<T, PATTERN>
                                                                           : sparse_free_as<T, UNIFORM>;
  return as(n, w, factor_0, factor_1, update, gain, k);
}

// Splits anew where the factors do not compose to the weight in its storage format, because it was changed from
// outside.
template <class T>
void split_stale(int32_t dtype, int64_t n, const T* w, T* factor_0, T* factor_1, T imbalance) {
  T product[BLOCK];
  for (int64_t i = 0; i < n; i++) product[i] = factor_0[i] * factor_1[i];
  if constexpr (sizeof(T) == 4)
    if (dtype != FP32) {
      uint16_t rounded[BLOCK];
      store(dtype, n, product, rounded);
      load(dtype, n, rounded, product);
    }
  if (!count_different(n, product, w)) return;
  for (int64_t i = 0; i < n; i++) {
    if (product[i] == w[i]) continue;
    T heavy = root((imbalance + root(imbalance * imbalance + 4 * w[i] * w[i])) / 2);
    factor_0[i] = heavy;
    factor_1[i] = heavy > 0 ? w[i] / heavy : T(0);
  }
}

}  // namespace
}  // namespace symopt
