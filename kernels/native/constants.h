// Numbers that every part of the step knows, and those of one step of one entry.

#pragma once

#include <cstddef>

#include "types.h"

namespace symopt {

// Those of kernels/reference/gauge.py; library.py compares them when it loads the library.
constexpr double SNAP = 1e-6, MIN_IMBALANCE_FACTOR = 0.98;
constexpr double AUTO_STRENGTH_MARGIN = 2, CRITICAL_EMA = 0.999, CRITICAL_FLOOR = 0.25;
constexpr int64_t SAMPLE = 1024;  // decays from which the imbalance takes its quantile

constexpr int64_t BLOCK = 512;         // what a direction hands to a retraction; in L1
constexpr int64_t MAX_STRIPE = 4096;   // columns summed side by side, at most
constexpr int HISTOGRAM_SHIFT = 16;    // bits of a size that a histogram leaves out

// Sizes of all units and exact zeros of an entry, or of a task of it.
struct Tally {
  double sum = 0, square = 0;
  int64_t zeros = 0;
  void add(double s, double q, int64_t z) { sum += s, square += q, zeros += z; }
};

// Everything about an entry that its weights have in common.  Decays are strengths times lr.
template <class T> struct StepConstants {
  static constexpr T largest = sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308);
  static constexpr T smallest = sizeof(T) == 4 ? T(1.1754943508222875e-38) : T(2.2250738585072014e-308);
  T lr, decay_kept, decay_pruned, threshold, imbalance, metric_scale, momentum, undamped, beta1, one_minus_beta1, beta2,
      one_minus_beta2, bias_correction1, bias_correction2, eps, grad_factor, weight_decay, imbalance_factor;
  T snap_limit;  // up to this size a weight may become zero: the threshold, or infinity without a budget
  int32_t direction, nesterov, saturated, pattern_n, pattern_m;

  StepConstants() = default;
  template <class S>
  [[gnu::always_inline]] inline explicit StepConstants(const StepConstants<S>& k)
      : lr(T(k.lr)), decay_kept(T(k.decay_kept)), decay_pruned(T(k.decay_pruned)), threshold(T(k.threshold)),
        imbalance(T(k.imbalance)), metric_scale(T(k.metric_scale)), momentum(T(k.momentum)), undamped(T(k.undamped)),
        beta1(T(k.beta1)), one_minus_beta1(T(k.one_minus_beta1)), beta2(T(k.beta2)),
        one_minus_beta2(T(k.one_minus_beta2)), bias_correction1(T(k.bias_correction1)),
        bias_correction2(T(k.bias_correction2)), eps(T(k.eps)), grad_factor(T(k.grad_factor)),
        weight_decay(T(k.weight_decay)), imbalance_factor(T(k.imbalance_factor)), snap_limit(T(k.snap_limit)),
        direction(k.direction), nesterov(k.nesterov), saturated(k.saturated), pattern_n(k.pattern_n),
        pattern_m(k.pattern_m) {}
};

}  // namespace symopt
