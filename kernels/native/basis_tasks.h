// How weights under a plane that is given by a basis are divided into tasks; basis.h has the sweeps.

#pragma once

#include "centred_tasks.h"

namespace symopt {
namespace {

struct BasisWork final : PlaneWork {
  struct Part {
    const Entry* e;
    int64_t begin, end;
  };

  const Functions& f;
  std::vector<Part> parts;
  std::vector<double> sums;
  std::vector<Mean> means;  // of every direction
  std::vector<MeanMove> moves;

  BasisWork(const PlaneEntry* p, const Settings& s)
      : PlaneWork(p), f(functions_of(s, *p->parameters[0])), means(static_cast<size_t>(p->columns)),
        moves(means.size()) {
    sample.resize(1);
    for (int64_t i = 0; i < plane->parameter_count; i++) {
      const Entry& e = *plane->parameters[i];
      const int64_t chunk = chunk_of(e.numel);
      for (int64_t at = 0; at < e.numel; at += chunk) parts.push_back({&e, at, std::min(e.numel, at + chunk)});
      weights += e.numel;
    }
    sums.resize(parts.size() * size());
  }

  size_t size() const { return static_cast<size_t>(2 + 2 * plane->columns); }

  PlaneSums survey(const StepConstants<double>& k, const Settings& s, double* sampled) override {
    sweep(int64_t(parts.size()), weights, s, [&](int64_t i) {
      const Part& p = parts[static_cast<size_t>(i)];
      f.survey_basis(*p.e, k, p.begin, p.end, plane->columns, sums.data() + size_t(i) * size());
    });
    for (size_t i = size(); i < sums.size(); i++) sums[i % size()] += sums[i];
    PlaneSums all;
    const double step_scale = f.second_moment(*plane->parameters[0], k, 0, sums[0] / double(weights));
    for (size_t j = 0; j < means.size(); j++) {
      means[j] = {sums[2 + j], sums[2 + means.size() + j], step_scale};
      add(all, means[j], 1);
    }
    all.update_sq = sums[1], all.sum_inverse = double(weights) / step_scale;
    if (sampled) sampled[0] = step_scale;
    return all;
  }

  Tally move(const StepConstants<double>& k, const Settings& s, const PlaneSums&, const Gate& gate,
             bool attracted) override {
    const Remainder remainder(means, 1, k, gate, attracted);
    for (size_t j = 0; j < means.size(); j++) moves[j] = remainder.move(means[j]);
    sweep(int64_t(parts.size()), weights, s, [&](int64_t i) {
      const Part& p = parts[static_cast<size_t>(i)];
      f.move_basis(*p.e, k, p.begin, p.end, plane->columns, moves.data());
    });
    return remainder.left;
  }
};

}  // namespace
}  // namespace symopt
