// What all planes have in common: two sweeps, and the gate that is decided in between.

#pragma once

#include "imbalance.h"
#include "tasks.h"

namespace symopt {
namespace {

// What a kind of plane does in the two sweeps of its step.
struct PlaneWork {
  const PlaneEntry* plane;
  int64_t weights = 0;
  std::vector<double> sample;  // preconditioners, for the law of the imbalance

  explicit PlaneWork(const PlaneEntry* p) : plane(p) {}
  virtual ~PlaneWork() = default;
  // Advances the moments, adds up what the gate needs and, where asked to, takes the sample; moves what needs no sums.
  virtual PlaneSums survey(const StepConstants<double>& k, const Settings& s, double* sampled) = 0;
  // Moves, and returns what is left off the plane.
  virtual Tally move(const StepConstants<double>& k, const Settings& s, const PlaneSums& all, const Gate& gate,
                     bool attracted) = 0;
};

// torch.maximum: NaN wins.
inline double greater(double a, double b) { return a != a || a > b ? a : b; }

// The running estimate of the strength that is needed, for the steps to come.
void update_critical(int64_t weights, const PlaneEntry& plane, const StepConstants<double>& k, const PlaneSums& all,
                     double amplify) {
  const bool decoupled = k.direction == ADAMW;
  const double squares = plane.gate_per_orbit ? all.largest_pull : decoupled ? all.dd : all.uu;
  double critical = k.bias_correction1 * std::sqrt(squares) / amplify, typical = 1;
  if (decoupled) critical /= plane.sqrt_dim_per_gate;  // per coordinate; its update of a steady gradient is 1
  else
    typical = k.bias_correction1 * std::sqrt(all.update_sq / double(weights)) / amplify * plane.sqrt_dim_per_gate;
  const Entry& e = *plane.parameters[0];
  const double running = CRITICAL_EMA * read(e, plane.critical);
  write(e, plane.critical, greater(running, greater(critical, CRITICAL_FLOOR * typical)));
}

// The gate of a whole plane.  Returns whether it attracts what is off the plane.
bool combine(double weights, const StepConstants<double>& k, const PlaneSums& all, Gate& gate) {
  const bool coupled = k.direction == ADAM;
  const double lr = k.lr * k.bias_correction1, c = k.imbalance, per_gate = coupled ? weights / all.sum_inverse : 1;
  const double decay = k.decay_kept * per_gate, metric = std::sqrt(c * c + 4 * all.ww), pull = lr * std::sqrt(all.dd);
  const double least = std::max(decay, 1.0), drive = greater(metric, greater(k.metric_scale, decay + 2 * pull));
  gate.t = 1 / (k.saturated ? drive : least);
  gate.square = (c + metric) / 2;
  // The gate sees the gradient through its own preconditioner; else the threshold would not be that of the norm.
  const double gradient = coupled && k.decay_kept != 0 ? per_gate * all.uw : all.dw;
  gate.own = gate.t * decay + gate.t * lr * gradient / std::max(gate.square, StepConstants<double>::smallest);
  return coupled ? lr * std::sqrt(all.uu) < k.decay_kept : pull < k.decay_kept;
}

void step_plane(PlaneWork& w, const Settings& s) {
  const PlaneEntry& plane = *w.plane;
  const Entry& e = *plane.parameters[0];
  count_step(e);
  StepConstants<double> k = step_constants(e, s);
  const double amplify = amplification(e, s);
  const bool counts = k.imbalance != 0 && s.imbalance_factor < 0;  // sizes and decays, for the law of the imbalance
  double* sample = counts && k.direction == ADAM ? w.sample.data() : nullptr;
  if (plane.critical) k.decay_kept = s.lr * AUTO_STRENGTH_MARGIN * read(e, plane.critical) * amplify;
  if (k.direction == ADAMW) k.decay_kept *= plane.sqrt_dim_per_gate;
  const PlaneSums all = w.survey(k, s, sample);
  if (plane.critical) update_critical(w.weights, plane, k, all, amplify);
  Gate gate{1, 0, 0};
  const bool attracted = !plane.gate_per_orbit && combine(double(w.weights), k, all, gate);
  Tally left = w.move(k, s, all, gate, attracted);
  if (!plane.gate_per_orbit && !std::isfinite(left.sum)) left = Tally();
  if (sample)
    for (double& x : w.sample) x *= k.decay_kept;
  if (k.imbalance != 0) decay_imbalance(e, k, sample, int64_t(w.sample.size()), left);
}

}  // namespace
}  // namespace symopt
