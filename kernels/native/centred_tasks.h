// How a weight whose means shall vanish is divided into tasks, and what is decided between the sweeps of centred.h.

#pragma once

#include "plane_tasks.h"

namespace symopt {
namespace {

// The move of a group, or of a direction, onto the plane and along it.
inline MeanMove onto_plane(const Mean& g, double reach) {
  const double along = reach * g.step_scale;
  return {along, along * g.update - g.off};
}

// How far groups of so many weights, or directions, lie off the plane after a step through one gate.
struct Remainder {
  double reach, rate, back, own;
  bool coupled, snaps = false;
  Tally left;

  Remainder(const std::vector<Mean>& means, double weights, const StepConstants<double>& k, const Gate& gate,
            bool attracted)
      : reach(k.lr * k.bias_correction1), rate(gate.t * k.decay_kept), back((1 - gate.own) * gate.square * gate.t),
        own(gate.own), coupled(k.direction == ADAM) {
    for (const Mean& g : means) left.square += weights * rest(g) * rest(g);
    left.sum = std::sqrt(left.square);
    snaps = left.sum <= SNAP * k.metric_scale && attracted;
    if (snaps) left = Tally();
  }

  double rest(const Mean& g) const {  // as gate_of_plane of orbit_loops.h
    const double decay = coupled ? rate * g.step_scale : rate, fits = 1 / std::max(decay, 1.0);
    const double most = std::min(decay, 1.0), shrink = own * most - own - most;
    return g.off + shrink * g.off - back * fits * reach * g.step_scale * g.update;
  }

  MeanMove move(const Mean& g) const {
    const MeanMove onto = onto_plane(g, reach);
    return {onto.along, onto.add + (snaps ? 0.0 : rest(g))};
  }
};

struct CentredWork final : PlaneWork {
  const Entry& e;
  const Functions& f;
  Stripes stripes;
  int64_t stride;
  std::unique_ptr<double[]> sums;  // of the parts of divided stripes
  std::vector<Mean> means;         // of all groups
  std::vector<MeanMove> moves;
  std::vector<char> moved;  // stripes that the survey has moved
  std::vector<PlaneSums> plane_sums;

  CentredWork(const PlaneEntry* p, const Settings& s)
      : PlaneWork(p), e(*p->parameters[0]), f(functions_of(s, e)) {
    stripes.partition(e);
    const int64_t groups = e.bands * e.groups;
    weights = e.numel, stride = std::max<int64_t>(1, groups / SAMPLE);
    means.resize(static_cast<size_t>(groups)), moves.resize(means.size());
    sample.resize(static_cast<size_t>((groups + stride - 1) / stride));
    moved.resize(static_cast<size_t>(stripes.count));
    plane_sums.resize(static_cast<size_t>(stripes.divided ? stripes.count : stripes.tasks));
    if (stripes.divided) sums.reset(new double[static_cast<size_t>(stripes.tasks * stripes.sums_size())]);
  }

  PlaneSums survey(const StepConstants<double>& k, const Settings& s, double* sampled) override {
    // A mean so small that all groups together count as on the plane; without lr or strength none is kept there.
    const double least = k.imbalance == 0 && k.lr > 0 && (plane->critical || k.decay_kept > 0)
                             ? SNAP * k.metric_scale / std::sqrt(double(weights)) : -1;
    const int64_t size = stripes.sums_size();
    sweep(stripes.tasks, weights, s, [&](int64_t task) {
      stripes.visit(task, [&](int64_t i, const Stripe& stripe, int64_t begin, int64_t end) {
        double own_sums[4 * MAX_STRIPE], *to = stripes.divided ? sums.get() + task * size : own_sums;
        std::fill(to, to + size, 0.0);
        f.survey(e, k, stripe, begin, end, to, true);
        if (stripes.divided) return;
        f.combine_means(e, k, stripe, to, 1, 0, means.data(), plane_sums[static_cast<size_t>(task)]);
        if ((moved[static_cast<size_t>(i)] = on_plane(stripe, least, k)))
          f.move_means(e, k, stripe, begin, end, moves.data());
      });
    });
    if (stripes.divided)
      sweep(stripes.count, weights, s, [&](int64_t i) {
        double* of_stripe = sums.get() + i * stripes.parts * size;
        PlaneSums& to = plane_sums[static_cast<size_t>(i)];
        f.combine_means(e, k, stripes.stripe(i), of_stripe, stripes.parts, size, means.data(), to);
      });
    PlaneSums all;
    for (const PlaneSums& part : plane_sums) all.add(part);
    for (size_t i = 0; sampled && i < sample.size(); i++)
      sampled[i] = means[i * static_cast<size_t>(stride)].step_scale;
    return all;
  }

  // Whether all groups of a stripe are on the plane, so that the stripe may move at once; prepares their moves.
  bool on_plane(const Stripe& stripe, double least, const StepConstants<double>& k) {
    bool all = true;
    for (int64_t g = stripe.group; g < stripe.group + stripe.groups; g++) {
      const Mean& mean = means[static_cast<size_t>(g)];
      all &= std::fabs(mean.off) <= least && std::isfinite(mean.update * mean.step_scale);
      moves[static_cast<size_t>(g)] = onto_plane(mean, k.lr * k.bias_correction1);
    }
    return all;
  }

  Tally move(const StepConstants<double>& k, const Settings& s, const PlaneSums&, const Gate& gate,
             bool attracted) override {
    const Remainder remainder(means, double(weights) / double(means.size()), k, gate, attracted);
    for (int64_t i = 0; i < stripes.count; i++) {
      const Stripe stripe = stripes.stripe(i);
      for (int64_t j = stripe.group; j < stripe.group + stripe.groups; j++) {
        const size_t g = static_cast<size_t>(j);
        moves[g] = moved[static_cast<size_t>(i)] ? MeanMove{0, remainder.rest(means[g])} : remainder.move(means[g]);
      }
    }
    sweep(stripes.tasks, weights, s, [&](int64_t task) {
      stripes.visit(task, [&](int64_t i, const Stripe& stripe, int64_t begin, int64_t end) {
        if (remainder.snaps && moved[static_cast<size_t>(i)]) return;
        f.move_means(e, k, stripe, begin, end, moves.data());
      });
    });
    return remainder.left;
  }
};

}  // namespace
}  // namespace symopt
