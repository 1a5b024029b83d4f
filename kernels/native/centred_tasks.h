// How a weight whose means shall vanish is cut into tasks, and what is decided between the sweeps of centred.h.
//
// Units and their parts are those of groups (native.cpp), so here, too, results do not depend on the number of threads.

// What takes a group, or a direction, onto the plane and along it.
inline Move onto_plane(const Mean& g, double reach) {
  const double forth = reach * g.speed;
  return {forth, forth * g.update - g.off};
}

// What groups of `members` weights, or directions, lie off the plane by after a step through one gate.
struct Settled {
  double reach, rate, back, own;
  bool coupled, snaps = false;
  Tally left;

  Settled(const std::vector<Mean>& means, double members, const Law<double>& k, const Gate& gate, bool attracted)
      : reach(k.lr * k.unbias1), rate(gate.t * k.inside), back((1 - gate.own) * gate.square * gate.t), own(gate.own),
        coupled(k.direction == ADAM) {
    for (const Mean& g : means) left.square += members * rest(g) * rest(g);
    left.sum = std::sqrt(left.square);
    snaps = left.sum <= SNAP * k.metric_scale && attracted;
    if (snaps) left = Tally();
  }

  double rest(const Mean& g) const {  // as gate_joint of orbit.h
    const double decay = coupled ? rate * g.speed : rate, fits = 1 / std::max(decay, 1.0), kept = std::min(decay, 1.0);
    const double lost = own * kept - own - kept;
    return g.off + lost * g.off - back * fits * reach * g.speed * g.update;
  }

  Move move(const Mean& g) const {
    const Move onto = onto_plane(g, reach);
    return {onto.forth, onto.add + (snaps ? 0.0 : rest(g))};
  }
};

struct CentredWork final : PlaneWork {
  Work work;
  int64_t stride;
  std::vector<Mean> means;  // of all groups
  std::vector<Move> moves;
  std::vector<char> glided;  // units that the first sweep has moved
  std::vector<Survey> surveys;

  explicit CentredWork(const Mirror* mirror) : PlaneWork(mirror) {
    Entry& e = *m->members[0];
    work.e = &e;
    cut(work);
    const int64_t groups = e.bands * e.groups;
    weights = e.numel, stride = std::max<int64_t>(1, groups / SAMPLE);
    means.resize(static_cast<size_t>(groups)), moves.resize(means.size());
    sample.resize(static_cast<size_t>((groups + stride - 1) / stride));
    glided.resize(static_cast<size_t>(work.units));
    surveys.resize(static_cast<size_t>(work.split ? work.units : work.tasks));
  }

  // f(i, unit, begin, end, task) for all units, or all parts of them.
  template <class F> void visit(const Settings& s, const F& f) {
    sweep(work.tasks, weights, s, [&](int64_t task) {
      int64_t begin, end;
      if (work.split) {
        const Unit unit = work.unit(task / work.parts);
        work.bounds(unit, task % work.parts, begin, end);
        return f(task / work.parts, unit, begin, end, task);
      }
      for (int64_t i = task * work.per_task; i < std::min(work.units, (task + 1) * work.per_task); i++) {
        const Unit unit = work.unit(i);
        f(i, unit, 0, unit.rows * unit.width, task);
      }
    });
  }

  Survey survey(const Law<double>& k, const Settings& s, double* sampled) override {
    const Entry& e = *work.e;
    const CentredFunctions& f = *SYMOPT_CHOOSE(centred_table, s.instructions)[e.dtype];
    // So little that all groups together are on the plane; without lr or strength nothing is kept there.
    const double least = k.imbalance == 0 && k.lr > 0 && (m->critical || k.inside > 0)
                             ? SNAP * k.metric_scale / std::sqrt(double(weights)) : -1;
    visit(s, [&](int64_t i, const Unit& unit, int64_t begin, int64_t end, int64_t task) {
      double here[4 * STRIPE], *sums = work.split ? work.sums.get() + task * work.sums_size : here;
      std::fill(sums, sums + work.sums_size, 0.0);
      f.reduce(e, k, unit, begin, end, sums);
      if (work.split) return;
      f.means(e, k, unit, sums, 1, 0, means.data(), surveys[static_cast<size_t>(task)]);
      bool near = true;
      for (int64_t g = unit.group; g < unit.group + unit.groups; g++) {
        const Mean& mean = means[static_cast<size_t>(g)];
        near &= std::fabs(mean.off) <= least && std::isfinite(mean.update * mean.speed);
        moves[static_cast<size_t>(g)] = onto_plane(mean, k.lr * k.unbias1);
      }
      glided[static_cast<size_t>(i)] = near;
      if (near) f.shift(e, k, unit, begin, end, moves.data());
    });
    if (work.split)
      sweep(work.units, weights, s, [&](int64_t i) {
        double* sums = work.sums.get() + i * work.parts * work.sums_size;
        f.means(e, k, work.unit(i), sums, work.parts, work.sums_size, means.data(), surveys[static_cast<size_t>(i)]);
      });
    Survey all;
    for (const Survey& part : surveys) all.add(part);
    for (size_t i = 0; sampled && i < sample.size(); i++) sampled[i] = means[i * static_cast<size_t>(stride)].speed;
    return all;
  }

  Tally move(const Law<double>& k, const Settings& s, const Survey&, const Gate& gate, bool attracted) override {
    const Entry& e = *work.e;
    const CentredFunctions& f = *SYMOPT_CHOOSE(centred_table, s.instructions)[e.dtype];
    const Settled settled(means, double(weights) / double(means.size()), k, gate, attracted);
    for (int64_t i = 0; i < work.units; i++) {
      const Unit unit = work.unit(i);
      for (int64_t j = unit.group; j < unit.group + unit.groups; j++) {
        const size_t g = static_cast<size_t>(j);
        moves[g] = glided[static_cast<size_t>(i)] ? Move{0, settled.rest(means[g])} : settled.move(means[g]);
      }
    }
    visit(s, [&](int64_t i, const Unit& unit, int64_t begin, int64_t end, int64_t) {
      if (settled.snaps && glided[static_cast<size_t>(i)]) return;
      f.shift(e, k, unit, begin, end, moves.data());
    });
    return settled.left;
  }
};
