// How weights that a plane makes equal are cut into tasks, and what is decided between the sweeps of orbit.h.
//
// The cut depends on the shape alone and sums of tasks are added in its order, so results do not depend on the number of
// threads.

constexpr double MARGIN = 2, MEMORY = 0.999, FLOOR = 0.25;  // as in mirror.py

struct Part {
  const Segment* s;
  int64_t begin, end, glided;  // blocks; and which of the flags below is that of the segment's first one
};

// What a kind of plane does in the two sweeps of its step.
struct PlaneWork {
  const Mirror* m;
  int64_t weights = 0;
  std::vector<double> sample;  // preconditioners, for the law of the imbalance

  explicit PlaneWork(const Mirror* mirror) : m(mirror) {}
  virtual ~PlaneWork() = default;
  // Advances the moments, sums up what the gate needs and, where asked to, takes the sample; moves what needs no sums.
  virtual Survey survey(const Law<double>& k, const Settings& s, double* sampled) = 0;
  // Moves, and returns what is left off the plane.
  virtual Tally move(const Law<double>& k, const Settings& s, const Survey& all, const Gate& gate, bool attracted) = 0;
};

struct MirrorWork final : PlaneWork {
  int64_t orbits = 0, stride = 1;
  std::vector<Part> parts;
  std::vector<Survey> surveys;
  std::vector<Tally> tallies;
  std::vector<char> glided;  // blocks that the first sweep has moved

  explicit MirrorWork(const Mirror* mirror) : PlaneWork(mirror) {
    int64_t flags = 0;
    for (int64_t i = 0; i < m->count; i++) {
      const Segment& s = m->segments[i];
      const int64_t least = std::max({int64_t(1), s.orbits / CHUNKS, CHUNK / 2 / s.copies}), count = blocks_of(s);
      for (int64_t at = 0, end; at < count; at = end) {
        for (end = at + 1; end < count && begin_of(s, end) - begin_of(s, at) < least;) end++;
        parts.push_back({&s, at, end, flags});
      }
      flags += count, orbits += s.orbits, weights += s.orbits * s.copies;
    }
    surveys.resize(parts.size()), tallies.resize(parts.size());
    glided.resize(static_cast<size_t>(flags));
    stride = std::max<int64_t>(1, orbits / SAMPLE);
    sample.resize(static_cast<size_t>((orbits + stride - 1) / stride));
  }

  Survey survey(const Law<double>& k, const Settings& s, double* sampled) override;
  Tally move(const Law<double>& k, const Settings& s, const Survey& all, const Gate& gate, bool attracted) override;
};

template <class F> struct Sweep {
  const F& f;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  static void worker(void* argument) {
    Sweep& sweep = *static_cast<Sweep*>(argument);
    for (int64_t task; (task = sweep.next++) < sweep.tasks;) sweep.f(task);
  }
};

// f(i) for every i below `tasks`.
template <class F> void sweep(int64_t tasks, int64_t weights, const Settings& s, const F& f) {
  Sweep<F> all{f, tasks};
  const unsigned threads = unsigned(std::min<int64_t>(s.threads, tasks));
  if (s.parallel && threads > 1 && weights > SERIAL) s.parallel(all.worker, &all, threads, 0);
  else all.worker(&all);
}

// f(part, its number) for every part of the work.
template <class F> void sweep(const MirrorWork& w, const Settings& s, bool backwards, const F& f) {
  const int64_t tasks = int64_t(w.parts.size());
  sweep(tasks, w.weights, s, [&](int64_t i) {
    const size_t task = static_cast<size_t>(backwards ? tasks - 1 - i : i);
    f(w.parts[task], task);
  });
}

Survey MirrorWork::survey(const Law<double>& k, const Settings& s, double* sampled) {
  const MirrorFunctions& f = *SYMOPT_CHOOSE(mirror_table, s.instructions)[m->members[0]->dtype];
  sweep(*this, s, false, [&](const Part& p, size_t task) {
    char* flags = glided.data() + p.glided;
    f.survey(*m, *p.s, k, p.begin, p.end, surveys[task], flags, tallies[task], sampled, stride);
  });
  Survey all;
  for (const Survey& part : surveys) all.add(part);
  return all;
}

// torch.maximum: NaN wins.
inline double greater(double a, double b) { return a != a || a > b ? a : b; }

// The running estimate of the strength that is needed, for the steps to come.
void remember(int64_t weights, const Mirror& m, const Law<double>& k, const Survey& all, double amplify) {
  const bool decoupled = k.direction == ADAMW;
  const double squares = m.each ? all.most : decoupled ? all.dd : all.uu;
  double critical = k.unbias1 * std::sqrt(squares) / amplify, typical = 1;
  if (decoupled) critical /= m.spread;  // per coordinate; its update of a steady gradient is 1
  else typical = k.unbias1 * std::sqrt(all.all / double(weights)) / amplify * m.spread;
  const Entry& e = *m.members[0];
  write(e, m.critical, greater(MEMORY * read(e, m.critical), greater(critical, FLOOR * typical)));
}

// mirror.py for one gate.  Returns whether it attracts what is off the plane.
bool decide(double weights, const Law<double>& k, const Survey& all, Gate& gate) {
  const bool coupled = k.direction == ADAM;
  const double lr = k.lr * k.unbias1, c = k.imbalance, pace = coupled ? weights / all.paces : 1;
  const double decay = k.inside * pace, metric = std::sqrt(c * c + 4 * all.ww), pull = lr * std::sqrt(all.dd);
  const double least = std::max(decay, 1.0), drive = greater(metric, greater(k.metric_scale, decay + 2 * pull));
  gate.t = 1 / (k.saturated ? drive : least);
  gate.square = (c + metric) / 2;
  // The gate sees the gradient through its own preconditioner; else the threshold would not be that of the norm.
  const double gradient = coupled && k.inside != 0 ? pace * all.uw : all.dw;
  gate.own = gate.t * decay + gate.t * lr * gradient / std::max(gate.square, Law<double>::smallest);
  return coupled ? lr * std::sqrt(all.uu) < k.inside : pull < k.inside;
}

// What is left off the plane, once the second sweep has moved what the first one has not.
Tally MirrorWork::move(const Law<double>& k, const Settings& s, const Survey& all, const Gate& gate, bool attracted) {
  const MirrorFunctions& f = *SYMOPT_CHOOSE(mirror_table, s.instructions)[m->members[0]->dtype];
  Tally left;
  // On the plane only a gate that is no number moves anything, and gates of their own have moved everything already.
  const bool still = m->each || (!all.moving && std::isfinite(gate.own * gate.t));
  if (!still)
    sweep(*this, s, true, [&](const Part& p, size_t task) {
      f.step(*m, *p.s, k, p.begin, p.end, gate, glided.data() + p.glided, tallies[task]);
    });
  for (const Tally& part : tallies) left.add(part.sum, part.square, 0);
  if (still) return left;
  left.sum = std::sqrt(left.square);
  if (left.sum <= SNAP * k.metric_scale && attracted) {
    left = Tally();
    if (all.ww > 0 || k.imbalance != 0)
      sweep(*this, s, false, [&](const Part& p, size_t) { f.snap(*m, *p.s, k, p.begin, p.end); });
  }
  return left;
}

void step_mirror(PlaneWork& w, const Settings& s) {
  const Mirror& m = *w.m;
  const Entry& e = *m.members[0];
  Law<double> k = law(e, s);
  const double amplify = s.direction == SGD && e.first ? (1 - s.dampening) / (1 - s.momentum) : 1;
  const bool counts = k.imbalance != 0 && s.imbalance_factor < 0;  // sizes and decays, for the law of the imbalance
  double* sample = counts && k.direction == ADAM ? w.sample.data() : nullptr;
  if (m.critical) k.inside = s.lr * MARGIN * read(e, m.critical) * amplify;
  if (k.direction == ADAMW) k.inside *= m.spread;
  const Survey all = w.survey(k, s, sample);
  if (m.critical) remember(w.weights, m, k, all, amplify);
  Gate gate{1, 0, 0};
  const bool attracted = !m.each && decide(double(w.weights), k, all, gate);
  Tally left = w.move(k, s, all, gate, attracted);
  if (!m.each && !std::isfinite(left.sum)) left = Tally();
  if (sample)
    for (double& x : w.sample) x *= k.inside;
  if (k.imbalance != 0) decay_imbalance(e, k, sample, int64_t(w.sample.size()), left);
}
