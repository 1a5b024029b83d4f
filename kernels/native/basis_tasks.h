// How weights under a plane that is given by a basis are cut into tasks; basis.h has the sweeps.

struct BasisWork final : PlaneWork {
  struct Part {
    const Entry* e;
    int64_t begin, end;
  };

  std::vector<Part> parts;
  std::vector<double> sums;
  std::vector<Mean> means;  // of every direction
  std::vector<Move> moves;

  explicit BasisWork(const Mirror* mirror)
      : PlaneWork(mirror), means(static_cast<size_t>(mirror->columns)), moves(means.size()) {
    sample.resize(1);
    for (int64_t i = 0; i < m->tensors; i++) {
      const Entry& e = *m->members[i];
      const int64_t chunk = std::max(e.numel < SMALL ? SMALL_CHUNK : CHUNK, (e.numel / CHUNKS + BLOCK) / BLOCK * BLOCK);
      for (int64_t at = 0; at < e.numel; at += chunk) parts.push_back({&e, at, std::min(e.numel, at + chunk)});
      weights += e.numel;
    }
    sums.resize(parts.size() * size());
  }

  size_t size() const { return static_cast<size_t>(2 + 2 * m->columns); }

  Survey survey(const Law<double>& k, const Settings& s, double* sampled) override {
    const Entry& e = *m->members[0];
    const BasisFunctions& f = *SYMOPT_CHOOSE(basis_table, s.instructions)[e.dtype];
    sweep(int64_t(parts.size()), weights, s, [&](int64_t i) {
      const Part& p = parts[static_cast<size_t>(i)];
      f.project(*p.e, k, p.begin, p.end, m->columns, sums.data() + size_t(i) * size());
    });
    for (size_t i = size(); i < sums.size(); i++) sums[i % size()] += sums[i];
    Survey all;
    const double speed = f.second_moment(e, k, 0, sums[0] / double(weights));
    for (size_t j = 0; j < means.size(); j++) {
      means[j] = {sums[2 + j], sums[2 + means.size() + j], speed};
      add(all, means[j], 1);
    }
    all.all = sums[1], all.paces = double(weights) / speed;
    if (sampled) sampled[0] = speed;
    return all;
  }

  Tally move(const Law<double>& k, const Settings& s, const Survey&, const Gate& gate, bool attracted) override {
    const BasisFunctions& f = *SYMOPT_CHOOSE(basis_table, s.instructions)[m->members[0]->dtype];
    const Settled settled(means, 1, k, gate, attracted);
    for (size_t j = 0; j < means.size(); j++) moves[j] = settled.move(means[j]);
    sweep(int64_t(parts.size()), weights, s, [&](int64_t i) {
      const Part& p = parts[static_cast<size_t>(i)];
      f.lift(*p.e, k, p.begin, p.end, m->columns, moves.data());
    });
    return settled.left;
  }
};
