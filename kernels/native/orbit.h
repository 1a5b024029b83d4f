// The step of weights that a fixed plane makes equal: kernels/mirror.py for orbits.
//
// Included like elementwise.h, once per instruction set.  Orbits of equally many copies are a segment; where its copies
// do not lie side by side, blocks of them are gathered, and what was written is scattered.  A joint gate needs its sums
// before any weight can move, so there are two sweeps: `survey` advances the moments and sums, `step` moves.  A block
// whose copies are equal already takes, without imbalance, the plain step whatever the gate: the first sweep then moves
// it at once, and on the plane no second one is needed.  Nor is one for gates of their own, which need no sums.

#define LOOP [[gnu::noinline]] static  // as in elementwise.h

// Where one copy of a block's orbits lies: `rows` rows of `columns` as a tile says, or n places.
struct Where {
  int64_t n, columns;
  Tile tile;
  const int32_t* places;
};

// `columns` rows of `from` become the columns of `to`.  Cache lines of the matrix are finished one after the other, because
// those of rows a few kilobytes apart would push each other out: WRITE says that it is `to`.
template <bool WRITE, class X>
static void turn_over(int64_t rows, int64_t columns, const X* from, int64_t from_apart, X* to, int64_t to_apart) {
  using V = Lanes<sizeof(X)>;
  constexpr int64_t L = 16 / sizeof(X);
  const int64_t outer = WRITE ? rows : columns, inner = WRITE ? columns : rows;
  for (int64_t o = 0; o < outer; o += L)
    for (int64_t i = 0; i < inner; i += L) {
      const int64_t r = WRITE ? o : i, c = WRITE ? i : o;
      if (r + L <= rows && c + L <= columns) {
        V v[L], w[L];
#pragma GCC unroll 8
        for (int64_t l = 0; l < L; l++) __builtin_memcpy(&v[l], from + (c + l) * from_apart + r, sizeof(V));
#pragma GCC unroll 3
        for (int64_t step = 1; step < L; step *= 2) {
#pragma GCC unroll 4
          for (int64_t l = 0; l < L / 2; l++)
            w[2 * l] = low(v[l], v[l + L / 2]), w[2 * l + 1] = high(v[l], v[l + L / 2]);
#pragma GCC unroll 8
          for (int64_t l = 0; l < L; l++) v[l] = w[l];
        }
#pragma GCC unroll 8
        for (int64_t l = 0; l < L; l++) __builtin_memcpy(to + (r + l) * to_apart + c, &v[l], sizeof(V));
      } else {
        for (int64_t x = c; x < std::min(c + L, columns); x++)
          for (int64_t y = r; y < std::min(r + L, rows); y++) to[y * to_apart + x] = from[x * from_apart + y];
      }
    }
}

// Copies whole pieces of a row; returns how much.
template <int64_t BYTES, class X> static int64_t copy_pieces(int64_t n, const X* from, X* to) {
  constexpr int64_t L = BYTES / sizeof(X);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    __builtin_memcpy(to + i, from + i, BYTES);
    asm volatile("" ::: "memory");  // else compilers call memmove for every row
  }
  return i;
}

template <class X>
static void copy_rows(int64_t rows, int64_t columns, const X* from, int64_t from_apart, X* to, int64_t to_apart) {
  for (int64_t r = 0; r < rows; r++, from += from_apart, to += to_apart) {
    int64_t c = copy_pieces<64>(columns, from, to);
    c += copy_pieces<16>(columns - c, from + c, to + c);
    for (; c < columns; c++) to[c] = from[c];
  }
}

template <class X> LOOP void gather(const Where w, const void* from, X* __restrict to) {
  const X* x = static_cast<const X*>(from);
  const int64_t rows = w.tile.rows, columns = w.columns, down = w.tile.down, across = w.tile.across;
  if (!rows)
    for (int64_t i = 0; i < w.n; i++) to[i] = x[w.places[i]];
  x += w.tile.at;
  if (across == 1 || columns == 1)
    copy_rows(rows, columns, x, down, to, columns);
  else if (down == 1)
    turn_over<false>(rows, columns, x, across, to, columns);
  else
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) to[r * columns + c] = x[r * down + c * across];
}

template <class X> LOOP void scatter(const Where w, const X* __restrict from, void* to) {
  X* x = static_cast<X*>(to);
  const int64_t rows = w.tile.rows, columns = w.columns, down = w.tile.down, across = w.tile.across;
  if (!rows)
    for (int64_t i = 0; i < w.n; i++) x[w.places[i]] = from[i];
  x += w.tile.at;
  if (across == 1 || columns == 1)
    copy_rows(rows, columns, from, columns, x, down);
  else if (down == 1)
    turn_over<true>(columns, rows, from, columns, x, across);
  else
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) x[r * down + c * across] = from[r * columns + c];
}

// One copy of the orbits of a block, side by side; arrays of full pages would be taken for one another.
template <class T, class W> struct Gathered {
  static constexpr int64_t N = BLOCK + 32;
  W weight[N], grad[N];
  T master[N], first[N];
};

// All copies of up to BLOCK neighbouring orbits of a segment.
template <class T, class W> struct Orbits {
  std::unique_ptr<Block<T, W>[]> copies;
  std::unique_ptr<Gathered<T, W>[]> gathered;  // null where copies lie side by side in memory
  std::unique_ptr<Entry[]> entries;            // what is gathered, as the blocks see it
  const Mirror& m;
  const Segment& s;
  const Law<T>& k;
  int64_t n = 0, at = 0, start = 0, block = 0;
  T speed[BLOCK];                                  // Adam's preconditioner
  T w_mean[BLOCK], u_mean[BLOCK];                  // of weight and update, over the copies
  T forth[BLOCK], lost[BLOCK], shift[BLOCK];       // w' = w - forth u_mean + lost (w - w_mean) - shift (u - u_mean)
  T ww[BLOCK], uu[BLOCK], uw[BLOCK], rest[BLOCK];  // sums over the copies, of what is off the plane

  Orbits(const Mirror& mirror, const Segment& segment, const Law<T>& law)
      : copies(new Block<T, W>[segment.copies]), m(mirror), s(segment), k(law) {
    if (!s.places) return;
    gathered.reset(new Gathered<T, W>[s.copies]);
    entries.reset(new Entry[s.copies]);
    for (int64_t j = 0; j < s.copies; j++) {
      Entry& e = entries[j];
      Gathered<T, W>& g = gathered[j];
      e = *m.members[s.of[j]];
      e.weight = g.weight, e.grad = g.grad;
      if (e.master) e.master = g.master;
      if (e.first) e.first = g.first;
    }
  }

  const Entry& entry(int64_t j) const { return s.places ? entries[j] : *m.members[j]; }
  Where where(int64_t j) const {
    const Tile& tile = s.tiles[j * s.count + block];
    return {n, tile.rows ? n / tile.rows : 0, tile, s.places + j * s.orbits + start};
  }

  // Fetches the block from an orbit on.  Of what is gathered nothing: what pieces of many rows cost is as many cache lines
  // as can be under way, not waiting for them.
  void look_ahead(int64_t begin, int64_t end, bool all) const {
    if (s.places) return;
    for (int64_t j = 0; j < s.copies; j++) expect<T, W>(entry(j), begin, end, all);
    fetch(entry(0).second, begin, end, sizeof(T));
  }

  // Turns to a block; `all` says that the gradients are needed.
  void turn(int64_t to, bool all) {
    block = to, start = begin_of(s, to), n = begin_of(s, to + 1) - start, at = s.places ? 0 : start;
    if (!s.places) return;
    for (int64_t j = 0; j < s.copies; j++) {
      const Entry& e = *m.members[s.of[j]];
      const Where w = where(j);
      Gathered<T, W>& g = gathered[j];
      gather(w, e.weight, g.weight);
      if (all || !e.first || k.nesterov) gather(w, e.grad, g.grad);
      if (e.master) gather(w, e.master, g.master);
      if (e.first) gather(w, e.first, g.first);
    }
  }

  // What the first sweep has written beside weights goes back to where it lay.
  void keep_moments() {
    if (!s.places) return;
    for (int64_t j = 0; j < s.copies; j++)
      if (void* first = m.members[s.of[j]]->first) scatter(where(j), gathered[j].first, first);
  }

  void close() {
    for (int64_t j = 0; j < s.copies; j++) {
      copies[j].close(entry(j), 0);
      if (!s.places) continue;
      const Entry& e = *m.members[s.of[j]];
      scatter(where(j), gathered[j].weight, e.weight);
      if (e.master) scatter(where(j), gathered[j].master, e.master);
    }
  }

  T* moment(void* of) const { return of ? static_cast<T*>(of) + at : nullptr; }
  T* shared(void* of) const { return of ? static_cast<T*>(of) + s.first + start : nullptr; }

  template <int N> Copies<T, N> streams() {
    Copies<T, N> c;
    for (int64_t j = 0; j < N; j++) {
      Block<T, W>& b = copies[j];
      c.g[j] = b.g, c.w[j] = b.w;
      c.u[j] = const_cast<T*>(b.u);  // written by the first sweep alone, and there only moments
    }
    return c;
  }

  // Opens the block and calls f(lead, streams, second moment, peak) with where the updates of the first sweep come from.
  template <int N, class F> int32_t leading(const F& f) {
    for (int64_t j = 0; j < N; j++) copies[j].open(entry(j), k, at, n);
    const Entry& e = entry(0);
    T *second = shared(e.second), *peak = shared(e.peak);
    if (k.direction == SGD && (!e.first || e.fresh)) {
      for (int64_t j = 0; j < N; j++) copies[j].direct(entry(j), k);
      return f(std::integral_constant<Lead, GIVEN>(), streams<N>(), second, peak);
    }
    Copies<T, N> c = streams<N>();
    for (int64_t j = 0; j < N; j++) c.u[j] = moment(entry(j).first);
    if (k.direction == SGD && k.nesterov) return f(std::integral_constant<Lead, NESTEROV>(), c, second, peak);
    if (k.direction == SGD) return f(std::integral_constant<Lead, MOMENTUM>(), c, second, peak);
    if (peak) return f(std::integral_constant<Lead, AMSGRAD>(), c, second, peak);
    return f(std::integral_constant<Lead, MOMENTS>(), c, second, peak);
  }

  template <int N> bool survey_few(Survey& sums) {
    return leading<N>([&](auto lead, const Copies<T, N>& c, T* second, T* peak) {
      return survey_copies<T, N, decltype(lead)::value>(n, c, second, peak, rest, k, sums);
    });
  }

  template <int N> bool step_few_each(Survey& sums, Tally& tally) {
    const int32_t apart = leading<N>([&](auto lead, const Copies<T, N>& c, T* second, T* peak) {
      auto step = k.imbalance == 0 ? step_copies_each<T, N, decltype(lead)::value, true>
                                   : step_copies_each<T, N, decltype(lead)::value, false>;
      return step(n, c, second, peak, k, sums, tally);
    });
    close();
    return apart;
  }

  // What Adam's preconditioner is made from, once the moments are advanced.
  const T* second_or_peak() const { return shared(entry(0).peak ? entry(0).peak : entry(0).second); }

  template <int N> double step_few(const Gate& gate, bool glided) {
    for (int64_t j = 0; j < N; j++) copies[j].recall(entry(j), k, at, n);
    auto move = k.direction == SGD ? move_copies<T, N, false> : move_copies<T, N, true>;
    const double square = move(n, streams<N>(), second_or_peak(), gate, glided, k);
    close();
    return square;
  }

  // Calls f with the number of copies where there are loops for it, and says whether there are.
  template <class F> bool few(const F& f) {
    switch (s.copies) {
      case 1: return f(std::integral_constant<int, 1>()), true;
      case 2: return f(std::integral_constant<int, 2>()), true;
      case 3: return f(std::integral_constant<int, 3>()), true;
      case 4: return f(std::integral_constant<int, 4>()), true;
      default: return false;
    }
  }

  // The first sweep of a block; returns whether copies differ.
  bool survey_block(int64_t block, Survey& sums) {
    turn(block, true);
    bool apart = false;
    if (!few([&](auto copies) { apart = this->template survey_few<decltype(copies)::value>(sums); }))
      apart = advance(sums);
    keep_moments();
    return apart;
  }

  // The whole step of a block whose orbits have gates of their own; returns whether copies differ.  `level` expects that
  // none do, and then the first sweep is all there is; to look beforehand would cost what it saves.
  bool step_block_each(int64_t block, bool level, Survey& sums, Tally& tally) {
    turn(block, true);
    bool apart = false;
    if (!few([&](auto copies) {
          constexpr int N = decltype(copies)::value;
          if (!level) apart = this->template step_few_each<N>(sums, tally);
          else if ((apart = this->template survey_few<N>(sums))) this->open(false), this->move_each(tally);
          else this->glide();
        })) {
      apart = advance(sums);
      if (level && !apart) glide();
      else move_each(tally);
    }
    keep_moments();
    return apart;
  }

  bool advance(Survey& sums) {
    open(true);
    survey(sums, m.each && m.critical);
    for (int64_t i = 0; i < n; i++) rest[i] = w_mean[i] - forth[i] * u_mean[i];
    return !together();
  }

  // The weights become what the first sweep has found them to be if they are equal.
  void glide() {
    for (int64_t j = 0; j < s.copies; j++) std::copy(rest, rest + n, copies[j].w);
    close();
  }

  // The second sweep of a block; returns the squared distance from the plane.
  double step_block(int64_t block, const Gate& gate, bool glided) {
    turn(block, false);
    double square = 0;
    if (few([&](auto copies) { square = this->template step_few<decltype(copies)::value>(gate, glided); }))
      return square;
    open(false);
    return move(gate, glided);
  }

  // The last step onto the plane: what was on it is the mean of what was written.
  void snap_block(int64_t block) {
    turn(block, false);
    open(false);
    for (int64_t j = 0; j < s.copies; j++) std::copy(w_mean, w_mean + n, copies[j].w);
    close();
  }

  void open(bool advance) {
    T* square = rest;
    std::fill(square, square + n, T(0));
    for (int64_t j = 0; j < s.copies; j++) {
      Block<T, W>& b = copies[j];
      if (advance) b.open(entry(j), k, at, n), b.direct(entry(j), k);
      else b.recall(entry(j), k, at, n);
      if (advance && k.direction != SGD) add_square(n, b.g, square);
    }
    T *second = shared(entry(0).second), *peak = shared(entry(0).peak);
    if (k.direction == SGD) std::fill(speed, speed + n, T(1));
    else if (!advance) precondition(n, peak ? peak : second, speed, k);
    else second_moment(n, square, second, peak, speed, T(1) / T(s.copies), k);
    for (T* sums : {w_mean, u_mean}) std::fill(sums, sums + n, T(0));
    for (int64_t j = 1; j < s.copies; j++) {
      difference(n, copies[0].w, copies[j].w, w_mean);
      difference(n, copies[0].u, copies[j].u, u_mean);
    }
    mean(n, copies[0].w, w_mean, T(1) / T(s.copies));
    mean(n, copies[0].u, u_mean, T(1) / T(s.copies));
    proportional(n, speed, forth, k.lr * k.unbias1);
  }

  bool together() const {
    int32_t apart = 0;
    for (int64_t j = 1; j < s.copies && !apart; j++) apart = differ(n, copies[0].w, copies[j].w);
    return !apart;
  }

  void sum_orbits() {
    for (T* sums : {ww, uu, uw}) std::fill(sums, sums + n, T(0));
    for (int64_t j = 0; j < s.copies; j++) add_orbits(n, copies[j].w, copies[j].u, w_mean, u_mean, ww, uu, uw);
  }

  // One gate: writes the step and returns the squared distance from the plane.
  double move(const Gate& gate, bool glided) {
    gate_joint(n, speed, forth, lost, shift, gate, k);
    if (glided) std::fill(forth, forth + n, T(0));
    double square = 0;
    for (int64_t j = 0; j < s.copies; j++)
      square += move_copy(n, copies[j].w, copies[j].u, w_mean, u_mean, forth, lost, shift);
    close();
    return square;
  }

  // A gate for every orbit.
  void move_each(Tally& tally) {
    sum_orbits();
    gate_each(n, speed, forth, ww, uu, uw, lost, shift, k);
    std::fill(rest, rest + n, T(0));
    for (int64_t j = 0; j < s.copies; j++)
      add_rest(n, copies[j].w, copies[j].u, w_mean, u_mean, lost, shift, rest);
    T *snaps = ww, *pull_sq = uu;
    settle_each(n, speed, forth, pull_sq, rest, snaps, k, tally);
    for (int64_t j = 0; j < s.copies; j++)
      move_or_snap(n, copies[j].w, copies[j].u, w_mean, u_mean, forth, lost, shift, snaps);
    close();
  }

  // -- the loops, out of line for the compiler's sake -----------------------------------------------------------------

  LOOP void add_square(int64_t n, const T* __restrict g, T* __restrict square) {
    for (int64_t i = 0; i < n; i++) square[i] += g[i] * g[i];
  }

  LOOP void precondition(int64_t n, const T* __restrict second, T* __restrict speed, const Law<T>& k) {
    const T unbias2 = k.unbias2, eps = k.eps;
    for (int64_t i = 0; i < n; i++) speed[i] = 1 / (root(second[i] * unbias2) + eps);
  }

  static void second_moment(int64_t n, const T* square, T* second, T* peak, T* speed, T share, const Law<T>& k) {
    accumulate(n, square, second, share * k.fresh2, k.beta2);
    if (peak)
      for (int64_t i = 0; i < n; i++) peak[i] = second[i] <= peak[i] ? peak[i] : second[i];
    precondition(n, peak ? peak : second, speed, k);
  }

  LOOP void accumulate(int64_t n, const T* __restrict square, T* __restrict second, T fresh, T beta) {
    for (int64_t i = 0; i < n; i++) second[i] = beta * second[i] + fresh * square[i];
  }

  LOOP void difference(int64_t n, const T* __restrict x, const T* __restrict y, T* __restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] += y[i] - x[i];
  }

  // From the first copy on, so that the mean of equal numbers is that number.
  LOOP void mean(int64_t n, const T* __restrict x, T* __restrict to, T share) {
    for (int64_t i = 0; i < n; i++) to[i] = x[i] + share * to[i];
  }

  LOOP void proportional(int64_t n, const T* __restrict x, T* __restrict to, T factor) {
    for (int64_t i = 0; i < n; i++) to[i] = factor * x[i];
  }

  LOOP int32_t differ(int64_t n, const T* x, const T* y) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += x[i] != y[i];
    return count;
  }

  LOOP void gate_joint(int64_t n, const T* __restrict speed, const T* __restrict forth, T* __restrict lost,
                       T* __restrict shift, const Gate& gate, const Law<T>& k) {
    const bool coupled = k.direction == ADAM;
    const T own = T(gate.own), rate = T(gate.t * k.inside), reach = T((1 - gate.own) * gate.square * gate.t);
    for (int64_t i = 0; i < n; i++) {
      // A weight that has no gradient has a decay without bounds; its factor must not overshoot zero.
      T decay = coupled ? rate * speed[i] : rate, fits = 1 / larger(decay, T(1));
      decay = smaller(decay, T(1));
      lost[i] = own * decay - own - decay;
      shift[i] = reach * fits * forth[i];
    }
  }

  LOOP double move_copy(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict w_mean,
                        const T* __restrict u_mean, const T* __restrict forth, const T* __restrict lost,
                        const T* __restrict shift) {
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) {
      T off = w[i] - w_mean[i], back = shift[i] * (u[i] - u_mean[i]), rest = off + lost[i] * off - back;
      w[i] = w[i] - forth[i] * u_mean[i] + lost[i] * off - back;
      square += rest * rest;
    }
    return double(square);
  }

  LOOP void add_orbits(int64_t n, const T* w, const T* u, const T* w_mean, const T* u_mean, T* __restrict ww,
                       T* __restrict uu, T* __restrict uw) {
    for (int64_t i = 0; i < n; i++) {
      T off = w[i] - w_mean[i], d = u[i] - u_mean[i];
      ww[i] += off * off, uu[i] += d * d, uw[i] += d * off;
    }
  }

  LOOP void gate_each(int64_t n, const T* __restrict speed, const T* __restrict forth, const T* __restrict ww,
                      const T* __restrict uu, const T* __restrict uw, T* __restrict lost, T* __restrict shift,
                      const Law<T>& k) {
    const bool coupled = k.direction == ADAM, saturated = k.saturated;
    const T c = k.imbalance, scale = k.metric_scale, inside = k.inside;
    for (int64_t i = 0; i < n; i++) {
      T decay = coupled ? inside * speed[i] : inside, pull = forth[i] * root(uu[i]), metric = root(c * c + 4 * ww[i]);
      T most = saturated ? larger(metric, larger(scale, decay + 2 * pull)) : larger(decay, T(1));
      T t = 1 / most, square = (c + metric) / 2;
      decay = t * decay;
      T own = decay + t * forth[i] * uw[i] / larger(square, Law<T>::smallest);
      lost[i] = own * decay - own - decay;
      shift[i] = (1 - own) * square * t * forth[i];
    }
  }

  LOOP void add_rest(int64_t n, const T* w, const T* u, const T* w_mean, const T* u_mean, const T* lost, const T* shift,
                     T* __restrict rest) {
    for (int64_t i = 0; i < n; i++) {
      T off = w[i] - w_mean[i], x = off + lost[i] * off - shift[i] * (u[i] - u_mean[i]);
      rest[i] += x * x;
    }
  }

  LOOP void settle_each(int64_t n, const T* __restrict speed, const T* __restrict forth, const T* __restrict pull_sq,
                        const T* __restrict rest, T* __restrict snaps, const Law<T>& k, Tally& tally) {
    const bool coupled = k.direction == ADAM;
    const T inside = k.inside, snap = T(SNAP) * k.metric_scale;
    T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
    for (int64_t i = 0; i < n; i++) {
      T decay = coupled ? inside * speed[i] : inside, far = root(rest[i]);
      bool snapped = (far <= snap) & (forth[i] * root(pull_sq[i]) < decay);
      snaps[i] = snapped ? T(1) : T(0);
      far = (snapped | !(far <= Law<T>::largest)) ? T(0) : far;
      sum += far, square += far * far;
    }
    tally.add(sum, square, 0);
  }

  LOOP void move_or_snap(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict w_mean,
                         const T* __restrict u_mean, const T* __restrict forth, const T* __restrict lost,
                         const T* __restrict shift, const T* __restrict snaps) {
    for (int64_t i = 0; i < n; i++) {
      T off = w[i] - w_mean[i], glide = forth[i] * u_mean[i];
      T x = w[i] - glide + lost[i] * off - shift[i] * (u[i] - u_mean[i]), on = w_mean[i] - glide;
      w[i] = snaps[i] != 0 ? on : x;
    }
  }

  // Adds what one gate needs, and the largest pull of a single orbit for those that have one each.
  void survey(Survey& sums, bool each) {
    for (int64_t j = 0; j < s.copies; j++)
      add_survey(n, copies[j].w, copies[j].u, w_mean, u_mean, speed, sums);
    if (k.direction == ADAM) sums.paces += paces(n, speed);
    if (each) {
      sum_orbits();
      const bool scaled = k.direction == ADAMW;
      for (int64_t i = 0; i < n; i++) {
        double pull = scaled ? double(speed[i]) * speed[i] * uu[i] : double(uu[i]);
        sums.most = pull <= sums.most || sums.most != sums.most ? sums.most : pull;  // NaN stays
      }
    }
  }

  // Preconditioners of orbits whose number is a multiple of `stride`.
  void take(double* sample, int64_t stride) {
    const T* from = second_or_peak();
    const int64_t id = s.first + start;
    for (int64_t i = (id + stride - 1) / stride * stride; i < id + n; i += stride)
      precondition(1, from + (i - id), speed, k), sample[i / stride] = double(speed[0]);
  }

  LOOP double paces(int64_t n, const T* speed) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += 1 / speed[i];
    return double(sum);
  }

  LOOP void add_survey(int64_t n, const T* w, const T* u, const T* w_mean, const T* u_mean, const T* speed, Survey& s) {
    constexpr int64_t EXACT = 256;  // as add_sums
    for (int64_t start = 0; start < n; start += EXACT) {
      const int64_t end = n - start < EXACT ? n : start + EXACT;
      T ww = 0, uu = 0, uw = 0, dd = 0, dw = 0, all = 0;
#pragma omp simd reduction(+ : ww, uu, uw, dd, dw, all)
      for (int64_t i = start; i < end; i++) {
        T off = w[i] - w_mean[i], x = u[i] - u_mean[i], d = speed[i] * x;
        ww += off * off, uu += x * x, uw += x * off, dd += d * d, dw += d * off, all += u[i] * u[i];
      }
      s.ww += ww, s.uu += uu, s.uw += uw, s.dd += dd, s.dw += dw, s.all += all;
    }
  }
};

template <class T, class W> static const MirrorFunctions* mirror_functions() {
  static const MirrorFunctions table = {
      [](const Mirror& m, const Segment& s, const Law<double>& law, int64_t begin, int64_t end, Survey& sums,
         char* glided, Tally& tally, double* sample, int64_t stride) {
        const Law<T> k(law);
        // Even on the plane a strength that is no number moves what it gates.
        const bool calm = (k.imbalance == 0 || s.copies == 1) && (!m.each || std::isfinite(k.inside));
        bool apart = false;  // a block is mostly like the one before
        Orbits<T, W> o(m, s, k);
        for (int64_t i = begin; i < end; i++) {
          o.look_ahead(begin_of(s, i + 1), s.orbits, true);
          if (m.each) {
            apart = o.step_block_each(i, calm && !apart, sums, tally);
          } else {
            glided[i] = !o.survey_block(i, sums) && calm;
            if (glided[i]) o.glide();
            else sums.moving++;
          }
          if (sample) o.take(sample, stride);
        }
        sums.paces *= double(s.copies);
        if (s.copies == 1) sums.most = 0;  // a free weight has no pull, not even a lost one
      },
      [](const Mirror& m, const Segment& s, const Law<double>& law, int64_t begin, int64_t end, const Gate& gate,
         const char* glided, Tally& tally) {
        const Law<T> k(law);
        const bool still = s.copies == 1 && std::isfinite(T(gate.own * gate.t));
        Orbits<T, W> o(m, s, k);
        for (int64_t i = begin; i < end; i++)
          if (!(still && glided[i])) {
            o.look_ahead(begin_of(s, i + 1), s.orbits, false);
            tally.square += o.step_block(i, gate, glided[i]);
          }
      },
      [](const Mirror& m, const Segment& s, const Law<double>& law, int64_t begin, int64_t end) {
        const Law<T> k(law);
        Orbits<T, W> o(m, s, k);
        for (int64_t i = begin; i < end && s.copies > 1; i++) o.snap_block(i);
      }};
  return &table;
}

static const MirrorFunctions* const mirror_table[] = {mirror_functions<float, float>(), mirror_functions<double, double>(),
                                                      mirror_functions<float, Bfloat>(), mirror_functions<float, Half>()};

#undef LOOP
