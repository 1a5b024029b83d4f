// The step of weights whose means over groups shall vanish: kernels/mirror.py where what is off the plane is one number
// per group.
//
// Included like elementwise.h, once per instruction set.  Two sweeps, as the gate needs its sums before any weight can
// move: the first advances the moments and takes means, the second moves.  What is decided in between is a few numbers
// per group.  Groups that are on the plane already move at once, as if they were to stay there.

#define LOOP [[gnu::noinline]] static  // as in elementwise.h

// The next second moment of all that share the i-th, and their preconditioner.
template <class T> static double second_moment(const Entry& e, const Law<double>& k, int64_t i, double square) {
  if (k.direction == SGD) return 1;
  T* second = static_cast<T*>(e.second) + i;
  T v = *second = T(k.beta2 * *second + k.fresh2 * square);
  if (e.peak) {
    T* peak = static_cast<T*>(e.peak) + i;
    v = *peak = v <= *peak ? *peak : v;
  }
  return 1 / (root(double(v) * k.unbias2) + k.eps);
}

// Sums of `parts` parts, `size` apart (g^2, u, w, u^2) -> the means and second moments of the unit's groups, and what
// the gate needs.
template <class T>
static void means(const Entry& e, const Law<double>& k, const Unit& unit, double* sums, int64_t parts, int64_t size,
                  Mean* to, Survey& survey) {
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[p * size + i];
  const int64_t run = unit.groups == 1 ? 1 : unit.run, pitch = unit.groups == 1 ? 1 : unit.width;
  const double count = double(unit.rows) * unit.run;
  for (int64_t j = 0; j < unit.groups; j++) {
    double s[4] = {0, 0, 0, 0};
    for (int q = 0; q < 4; q++)
      for (int64_t r = 0; r < run; r++) s[q] += sums[q * pitch + j * run + r];
    const Mean found = {s[2] / count, s[1] / count, second_moment<T>(e, k, unit.group + j, s[0] / count)};
    to[unit.group + j] = found;
    add(survey, found, count);
    survey.all += s[3], survey.paces += count / found.speed;
  }
}

// w' = w - forth u + add.
template <class T> LOOP void drift(int64_t n, T* __restrict w, const T* __restrict u, T forth, T add) {
  for (int64_t i = 0; i < n; i++) w[i] = w[i] - forth * u[i] + add;
}

template <class T>
LOOP void drift_columns(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict forth,
                        const T* __restrict add) {
  for (int64_t i = 0; i < n; i++) w[i] = w[i] - forth[i] * u[i] + add[i];
}

template <class T, class W>
static void shift(const Entry& e, const Law<T>& k, const Unit& unit, int64_t first, int64_t last, const Move* moves) {
  Block<T, W> b;
  T forth[STRIPE], add[STRIPE];
  const bool one = unit.groups == 1;
  for (int64_t j = 0; j < unit.groups; j++)
    for (int64_t r = 0; r < (one ? 1 : unit.run); r++) {
      const int64_t i = one ? 0 : j * unit.run + r;
      forth[i] = T(moves[unit.group + j].forth), add[i] = T(moves[unit.group + j].add);
    }
  walk(unit, first, last, [&](int64_t at, int64_t n) {
    b.recall(e, k, at, n);
    const int64_t column = one ? 0 : (at - unit.base) % unit.row_stride;
    if (one) drift(n, b.w, b.u, forth[0], add[0]);
    else drift_columns(n, b.w, b.u, forth + column, add + column);
    b.close(e, 0);
  });
}

template <class T, class W> static const CentredFunctions* centred_functions() {
  static const CentredFunctions table = {
      sum_up<T, W, true>, means<T>,
      [](const Entry& e, const Law<double>& k, const Unit& unit, int64_t first, int64_t last, const Move* moves) {
        shift<T, W>(e, Law<T>(k), unit, first, last, moves);
      }};
  return &table;
}

static const CentredFunctions* const centred_table[] = {centred_functions<float, float>(),
                                                        centred_functions<double, double>(),
                                                        centred_functions<float, Bfloat>(),
                                                        centred_functions<float, Half>()};

#undef LOOP
