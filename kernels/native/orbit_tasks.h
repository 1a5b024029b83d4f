// How weights that a plane makes equal are divided into tasks; orbit.h has the sweeps.

#pragma once

#include "plane_tasks.h"

namespace symopt {
namespace {

struct OrbitWork final : PlaneWork {
  struct Part {
    const Segment* s;
    int64_t begin, end;  // blocks
    int64_t flag;        // place of the segment's first block in `moved`
  };

  const Functions& f;
  int64_t orbits = 0, stride = 1;
  std::vector<Part> parts;
  std::vector<PlaneSums> sums;
  std::vector<Tally> tallies;
  std::vector<char> moved;  // blocks that the survey has moved

  OrbitWork(const PlaneEntry* p, const Settings& s) : PlaneWork(p), f(functions_of(s, *p->parameters[0])) {
    int64_t flags = 0;
    for (int64_t i = 0; i < plane->segment_count; i++) {
      const Segment& s = plane->segments[i];
      const int64_t least = std::max({int64_t(1), s.orbits / CHUNKS, CHUNK / 2 / s.copies}), count = block_count(s);
      for (int64_t at = 0, end; at < count; at = end) {
        for (end = at + 1; end < count && begin_of(s, end) - begin_of(s, at) < least;) end++;
        parts.push_back({&s, at, end, flags});
      }
      flags += count, orbits += s.orbits, weights += s.orbits * s.copies;
    }
    sums.resize(parts.size()), tallies.resize(parts.size());
    moved.resize(static_cast<size_t>(flags));
    stride = std::max<int64_t>(1, orbits / SAMPLE);
    sample.resize(static_cast<size_t>((orbits + stride - 1) / stride));
  }

  // g(part, its number) for every part of the work.
  template <class G> void visit(const Settings& s, bool backwards, const G& g) const {
    const int64_t tasks = int64_t(parts.size());
    sweep(tasks, weights, s, [&](int64_t i) {
      const size_t task = static_cast<size_t>(backwards ? tasks - 1 - i : i);
      g(parts[task], task);
    });
  }

  PlaneSums survey(const StepConstants<double>& k, const Settings& s, double* sampled) override {
    visit(s, false, [&](const Part& p, size_t task) {
      char* flags = moved.data() + p.flag;
      f.survey_orbits(*plane, *p.s, k, p.begin, p.end, sums[task], flags, tallies[task], sampled, stride);
    });
    PlaneSums all;
    for (const PlaneSums& part : sums) all.add(part);
    return all;
  }

  Tally move(const StepConstants<double>& k, const Settings& s, const PlaneSums& all, const Gate& gate,
             bool attracted) override {
    Tally left;
    // Nothing is left to move if the survey has moved all blocks, unless the gate is no number, and if every orbit has
    // its own gate.
    const bool done = plane->gate_per_orbit || (!all.unmoved && std::isfinite(gate.own * gate.t));
    if (!done)
      visit(s, true, [&](const Part& p, size_t task) {
        f.move_orbits(*plane, *p.s, k, p.begin, p.end, gate, moved.data() + p.flag, tallies[task]);
      });
    for (const Tally& part : tallies) left.add(part.sum, part.square, 0);
    if (done) return left;
    left.sum = std::sqrt(left.square);
    if (left.sum <= SNAP * k.metric_scale && attracted) {
      left = Tally();
      if (all.ww > 0 || k.imbalance != 0)
        visit(s, false, [&](const Part& p, size_t) { f.snap_orbits(*plane, *p.s, k, p.begin, p.end); });
    }
    return left;
  }
};

}  // namespace
}  // namespace symopt
