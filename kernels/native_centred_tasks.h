// How a weight whose means shall vanish is cut into tasks, and what is decided between the sweeps of native_centred.h.
//
// Units and their parts are those of groups (native.cpp), so here, too, results do not depend on the number of threads.

// Between the sweeps: what groups of `members` weights, or directions, move by; returns what is left off the plane.
Tally settle(std::vector<Mean>& means, double members, const Law<double>& k, const Gate& gate, bool attracted) {
  const double reach = k.lr * k.unbias1, rate = gate.t * k.inside, back = (1 - gate.own) * gate.square * gate.t;
  const bool coupled = k.direction == ADAM;
  const auto rest = [&](const Mean& g) {  // as gate_joint of native_mirror.h
    const double decay = coupled ? rate * g.speed : rate, fits = 1 / std::max(decay, 1.0), kept = std::min(decay, 1.0);
    const double lost = gate.own * kept - gate.own - kept;
    return g.off + lost * g.off - back * fits * reach * g.speed * g.update;
  };
  Tally left;
  for (const Mean& g : means) left.square += members * rest(g) * rest(g);
  left.sum = std::sqrt(left.square);
  const bool snaps = left.sum <= SNAP * k.metric_scale && attracted;
  for (Mean& g : means) {
    const double forth = reach * g.speed;
    g.off = forth * g.update + (snaps ? 0.0 : rest(g)) - g.off, g.speed = forth;
  }
  return snaps ? Tally() : left;
}

struct CentredWork {
  const Mirror* m;
  Work work;
  int64_t weights, stride, samples;
  std::vector<Mean> means;  // of all groups
  std::vector<Survey> surveys;
  std::vector<double> sample;

  CentredWork(const Mirror* mirror) : m(mirror) {
    Entry& e = *m->members[0];
    work.e = &e;
    cut(work);
    const int64_t groups = e.bands * e.groups;
    weights = e.numel, stride = std::max<int64_t>(1, groups / SAMPLE), samples = (groups + stride - 1) / stride;
    means.resize(static_cast<size_t>(groups)), sample.resize(static_cast<size_t>(samples));
    surveys.resize(static_cast<size_t>(work.split ? work.units : work.tasks));
  }

  // f(unit, begin, end, task, its number) for all units, or all parts of them.
  template <class F> void visit(const Settings& s, const F& f) {
    sweep(work.tasks, weights, s, [&](int64_t task) {
      int64_t begin, end;
      if (work.split) {
        const Unit unit = work.unit(task / work.parts);
        work.bounds(unit, task % work.parts, begin, end);
        return f(unit, begin, end, task);
      }
      for (int64_t i = task * work.per_task; i < std::min(work.units, (task + 1) * work.per_task); i++) {
        const Unit unit = work.unit(i);
        f(unit, 0, unit.rows * unit.width, task);
      }
    });
  }

  Survey survey(const Law<double>& k, const Settings& s, double* sampled) {
    const Entry& e = *work.e;
    const CentredFunctions& f = *SYMOPT_CHOOSE(centred_table, s.instructions)[e.dtype];
    visit(s, [&](const Unit& unit, int64_t begin, int64_t end, int64_t task) {
      double here[4 * STRIPE], *sums = work.split ? work.sums.get() + task * work.sums_size : here;
      std::fill(sums, sums + work.sums_size, 0.0);
      f.total(e, k, unit, begin, end, sums);
      if (!work.split) f.means(e, k, unit, sums, 1, 0, means.data(), surveys[static_cast<size_t>(task)]);
    });
    if (work.split)
      sweep(work.units, weights, s, [&](int64_t i) {
        double* sums = work.sums.get() + i * work.parts * work.sums_size;
        f.means(e, k, work.unit(i), sums, work.parts, work.sums_size, means.data(), surveys[static_cast<size_t>(i)]);
      });
    Survey all;
    for (const Survey& part : surveys) all.add(part);
    for (int64_t i = 0; sampled && i < samples; i++) sampled[i] = means[static_cast<size_t>(i * stride)].speed;
    return all;
  }

  Tally move(const Law<double>& k, const Settings& s, const Survey&, const Gate& gate, bool attracted) {
    const Entry& e = *work.e;
    const Tally left = settle(means, double(weights) / double(means.size()), k, gate, attracted);
    const CentredFunctions& f = *SYMOPT_CHOOSE(centred_table, s.instructions)[e.dtype];
    visit(s, [&](const Unit& unit, int64_t begin, int64_t end, int64_t) { f.shift(e, k, unit, begin, end, means.data()); });
    return left;
  }
};
