// The numbers of one step, and the law of the imbalance: kernels/reference/gauge.py.

#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"

namespace symopt {
namespace {

template <class T> double read(const void* p) { return double(*static_cast<const T*>(p)); }

// A number of the state, in the precision in which the entry is stepped.
double read(const Entry& e, const void* p) { return e.dtype == FP64 ? read<double>(p) : read<float>(p); }

void write(const Entry& e, void* p, double x) {
  if (e.dtype == FP64) *static_cast<double*>(p) = x;
  else *static_cast<float*>(p) = float(x);
}

// By how much momentum amplifies a constant gradient, and so the strength.
double amplification(const Entry& e, const Settings& s) {
  return s.direction == SGD && e.first ? s.amplification : 1;
}

// Counts the step where there is a counter.
void count_step(const Entry& e) {
  if (!e.step) return;
  const double step = (e.wide_step ? read<double>(e.step) : read<float>(e.step)) + 1;
  if (e.wide_step) *static_cast<double*>(e.step) = step;
  else *static_cast<float*>(e.step) = float(step);
}

StepConstants<double> step_constants(const Entry& e, const Settings& s) {
  StepConstants<double> k;
  const bool constrained = e.retraction != PLAIN, decoupled = s.direction == ADAMW || s.direction == LION;
  const double step = !e.step ? 0 : e.wide_step ? read<double>(e.step) : read<float>(e.step);
  k.direction = s.direction == ADAM && e.decoupled ? ADAMW : s.direction;
  k.nesterov = s.nesterov, k.saturated = s.saturated;
  k.lr = s.lr, k.momentum = s.momentum, k.undamped = 1 - s.dampening, k.eps = s.eps;
  k.beta1 = s.beta1, k.one_minus_beta1 = 1 - s.beta1, k.beta2 = s.beta2, k.one_minus_beta2 = 1 - s.beta2;
  k.bias_correction1 = e.step ? 1 / (1 - std::pow(s.beta1, step)) : 1;
  k.bias_correction2 = e.step ? 1 / (1 - std::pow(s.beta2, step)) : 1;
  k.grad_factor = (s.maximize ? -1.0 : 1.0) / (s.grad_scale ? double(*s.grad_scale) : 1.0);
  k.weight_decay = constrained || decoupled ? 0 : s.weight_decay;
  const double amplify = amplification(e, s);
  const double given[5] = {e.strength_kept, e.strength_pruned, e.threshold, s.imbalance_factor, HUGE_VAL};
  const double* budget = e.budget ? e.budget : given;
  const bool pattern = e.pattern_m && budget[2] >= 0;
  k.pattern_n = pattern ? e.pattern_n : 0, k.pattern_m = pattern ? e.pattern_m : 0;
  k.decay_kept = constrained ? s.lr * budget[0] * amplify : decoupled ? s.lr * s.weight_decay : 0;
  k.decay_pruned = std::min(s.lr * budget[1], budget[4]) * amplify;
  k.threshold = budget[2], k.snap_limit = budget[2] < 0 && !e.budget ? HUGE_VAL : budget[2];
  k.imbalance_factor = budget[3];
  k.imbalance = e.imbalance ? read(e, e.imbalance) : 0;
  k.metric_scale = e.metric_scale ? read(e, e.metric_scale) : 1;
  return k;
}

// Whether the law of the imbalance takes a quantile of decays; else all are `decay_kept`.
bool samples_decays(const Entry& e, const Settings& s, bool grouped) {
  if (!e.imbalance || e.retraction == PLAIN || s.imbalance_factor >= 0 || e.budget) return false;
  const bool two_strengths = e.threshold >= 0 && e.strength_kept != e.strength_pruned;
  return s.direction == ADAM || two_strengths || (grouped && s.direction == ADAMW);
}

// One step of the law, or of the factor given for this step.  `sample` holds some decays, or nothing where all are
// `decay_kept`; `all` the sizes of the units.
void decay_imbalance(const Entry& e, const StepConstants<double>& k, double* sample, int64_t samples,
                     const Tally& all) {
  double c = k.imbalance, factor = k.imbalance_factor;
  if (factor < 0) {
    double decay = k.decay_kept;
    if (sample) {
      for (int64_t i = 0; i < samples; i++)
        if (sample[i] != sample[i]) sample[i] = HUGE_VAL;  // as kthvalue: NaN comes last
      double* low = sample + samples / 10;
      std::nth_element(sample, low, sample + samples);
      decay = *low;
    }
    if (k.saturated) {
      const double typical = 2 * all.square / std::max(all.sum, StepConstants<double>::smallest);
      decay /= std::max(k.metric_scale, typical);
    }
    const double rho = std::max(1 - decay, 0.0);
    factor = std::max(rho * rho * rho * rho, MIN_IMBALANCE_FACTOR);
  }
  c *= factor;
  if (c <= SNAP * k.metric_scale) c = 0;
  write(e, e.imbalance, c);
}

}  // namespace
}  // namespace symopt
