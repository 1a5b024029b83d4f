// orbit.h for the usual two to four copies, each sweep in one loop without arrays in between: a dozen streams
// that start at the same place of their pages leave a cache of eight ways no room for them.  Roots and divisions are what
// these loops wait for where memory is fast, so one of each serves as much as it can.

#define LOOP [[gnu::noinline]] static  // as in elementwise.h
#define EACH_COPY _Pragma("GCC unroll 4") for (int j = 0; j < N; j++)

// Where the updates of the first sweep come from; those that are given are only read.
enum Lead { GIVEN, MOMENTUM, NESTEROV, MOMENTS, AMSGRAD };

template <class T, int N> struct Copies {
  const T* g[N];
  T *u[N], *w[N];
};

template <int N> constexpr int WHOLE = N == 2 ? 2 : 1;

// The mean, and what is off it.  From the first copy on, so that the mean of equal numbers is that number.
template <class T, int N> inline T center(const T (&x)[N], T (&off)[N]) {
  if constexpr (N == 2) {
    off[1] = T(0.5) * (x[1] - x[0]), off[0] = -off[1];
    return x[0] + off[1];
  }
  T sum = 0;
  EACH_COPY sum += x[j] - x[0];
  const T mean = x[0] + T(1) / N * sum;
  EACH_COPY off[j] = x[j] - mean;
  return mean;
}

// An inner product of two such parts is WHOLE times this.
template <class T, int N> inline T dot(const T (&a)[N], const T (&b)[N]) {
  if constexpr (N == 2) return a[1] * b[1];
  T sum = 0;
  EACH_COPY sum += a[j] * b[j];
  return sum;
}

// The length of such a part; for two copies without a root.
template <class T, int N> inline T length(const T (&off)[N]) {
  return N == 2 ? T(1.4142135623730951) * size(off[1]) : root(dot(off, off));
}

// Numbers of the moments, by value: loops must not fear that what they write changes them.
template <class T, int N> struct Rates {
  T fresh1, beta2, fresh2, unbias2, eps, momentum, undamped;
  explicit Rates(const Law<T>& k)
      : fresh1(k.fresh1), beta2(k.beta2), fresh2(k.fresh2 / N), unbias2(k.unbias2), eps(k.eps), momentum(k.momentum),
        undamped(k.undamped) {}
};

// The copies of an orbit and their updates, once the moments are advanced; returns what Adam divides by, else 1.
template <class T, int N, Lead LEAD>
inline T advance(int64_t i, const Copies<T, N>& c, T* second, T* peak, const Rates<T, N>& r, T (&w)[N], T (&x)[N]) {
  EACH_COPY w[j] = c.w[j][i], x[j] = c.u[j][i];
  if (LEAD == MOMENTUM || LEAD == NESTEROV) EACH_COPY {
      x[j] = r.momentum * x[j] + r.undamped * c.g[j][i];
      c.u[j][i] = x[j];
      if (LEAD == NESTEROV) x[j] = c.g[j][i] + r.momentum * x[j];
    }
  if (LEAD != MOMENTS && LEAD != AMSGRAD) return 1;
  T squares = 0;
  EACH_COPY {
    T g = c.g[j][i];
    x[j] = x[j] + r.fresh1 * (g - x[j]);
    c.u[j][i] = x[j];
    squares += g * g;
  }
  T v = r.beta2 * second[i] + r.fresh2 * squares;
  second[i] = v;
  if (LEAD == AMSGRAD) {
    v = v <= peak[i] ? peak[i] : v;
    peak[i] = v;
  }
  return root(v * r.unbias2) + r.eps;
}

// The largest of what gates of their own would need, squared; NaN stays.
template <int N> void keep_most(Survey& s, double most, double witness) {
  if (s.most == s.most) s.most = witness == witness ? std::max(s.most, WHOLE<N> * most) : witness;
}

// The first sweep of one block; `on` takes what the weights become if they are equal.  Returns how many are not.
template <class T, int N, Lead LEAD>
LOOP int32_t survey_copies(int64_t n, const Copies<T, N> c, T* second, T* peak, T* on, const Law<T>& k, Survey& s) {
  constexpr bool adaptive = LEAD == MOMENTS || LEAD == AMSGRAD;
  const Rates<T, N> rates(k);
  const T reach = k.lr * k.unbias1, decoupled = k.direction == ADAMW ? T(1) : T(0);
  T ww = 0, uu = 0, uw = 0, dd = 0, dw = 0, all = 0, paces = 0, most = 0;
  int32_t apart = 0;
#pragma omp simd reduction(+ : ww, uu, uw, dd, dw, all, paces, apart) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    T w[N], x[N], inverse = advance<T, N, LEAD>(i, c, second, peak, rates, w, x), p = adaptive ? 1 / inverse : T(1);
    paces += inverse;
    T a[N], b[N], d[N], w_mean = center(w, a), u_mean = center(x, b), pull = dot(b, b);
    EACH_COPY d[j] = p * b[j];  // not p squared, which leaves the numbers of fp32 earlier
    const T drive = dot(d, d);
    EACH_COPY apart += j > 0 && w[j] != w[0], all += x[j] * x[j];
    ww += dot(a, a), uu += pull, uw += dot(a, b), dd += drive, dw += dot(a, d);
    most = larger(decoupled * drive + (1 - decoupled) * pull, most);
    on[i] = w_mean - reach * p * u_mean;
  }
  constexpr int whole = WHOLE<N>;
  s.ww += whole * ww, s.uu += whole * uu, s.uw += whole * uw, s.dd += whole * dd, s.dw += whole * dw;
  s.all += all, s.paces += paces;
  keep_most<N>(s, most, dd);
  return apart;
}

// The second sweep under one gate; returns the squared distance from the plane.
template <class T, int N, bool ADAPTIVE>
LOOP double move_copies(int64_t n, const Copies<T, N> c, const T* second, const Gate& gate, bool glided,
                        const Law<T>& k) {
  const T unbias2 = k.unbias2, eps = k.eps, own = T(gate.own), rate = T(gate.t * k.inside);
  const bool coupled = ADAPTIVE && k.direction == ADAM;
  // A weight that has no gradient has a decay without bounds; its factor must not overshoot zero.
  const T most = 1 / rate, fits = coupled ? T(1) : 1 / larger(rate, T(1)), reach = k.lr * k.unbias1;
  const T back = T((1 - gate.own) * gate.square * gate.t) * reach * fits, forth = glided ? T(0) : reach;
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) {
    T w[N], x[N], a[N], b[N], p = ADAPTIVE ? 1 / (root(second[i] * unbias2) + eps) : T(1);
    T decay = smaller(coupled ? rate * p : rate, T(1)), lost = own * decay - own - decay;
    EACH_COPY w[j] = c.w[j][i], x[j] = c.u[j][i];
    center(w, a);
    T u_mean = center(x, b), shift = back * (coupled ? smaller(p, most) : p), glide = forth * p * u_mean;
    EACH_COPY {
      b[j] = lost * a[j] - shift * b[j];
      a[j] += b[j];
      c.w[j][i] = w[j] - glide + b[j];
    }
    square += dot(a, a);
  }
  return WHOLE<N> * double(square);
}

// The only sweep with a gate for every orbit; returns how many are apart.  BALANCED: the imbalance is 0, the metric 2 |w|.
template <class T, int N, Lead LEAD, bool BALANCED>
LOOP int32_t step_copies_each(int64_t n, const Copies<T, N> c, T* second, T* peak, const Law<T>& k, Survey& s,
                              Tally& tally) {
  constexpr bool adaptive = LEAD == MOMENTS || LEAD == AMSGRAD;
  const Rates<T, N> rates(k);
  const T imbalance = k.imbalance, scale = k.metric_scale;
  const T inside = k.inside, reach = k.lr * k.unbias1, snap = T(SNAP) * scale;
  const bool coupled = adaptive && k.direction == ADAM;
  const T decoupled = k.direction == ADAMW ? T(1) : T(0);
  // Without the time scale the largest of decay and 1, in the same words: a branch here costs GCC the vectors.
  const T scaled = k.saturated ? 1 : 0, twice = 2 * scaled, least = k.saturated ? scale : T(1);
  T sum = 0, squares = 0, all = 0, most = 0, drives = 0;
  int32_t apart = 0;
#pragma omp simd reduction(+ : sum, squares, all, drives, apart) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    T w[N], x[N], inverse = advance<T, N, LEAD>(i, c, second, peak, rates, w, x), p = adaptive ? 1 / inverse : T(1);
    T a[N], b[N], d[N], w_mean = center(w, a), u_mean = center(x, b), norm = length(a), forth = reach * p;
    EACH_COPY apart += j > 0 && w[j] != w[0], d[j] = p * b[j], all += x[j] * x[j];
    const T drive = dot(d, d);
    drives += drive;
    most = larger(decoupled * drive + (1 - decoupled) * dot(b, b), most);
    T decay = coupled ? inside * p : inside, pull = reach * length(d);
    T metric = BALANCED ? 2 * norm : root(imbalance * imbalance + 4 * WHOLE<N> * dot(a, a));
    T square = BALANCED ? norm : (imbalance + metric) / 2;
    T t = 1 / larger(scaled * metric, larger(least, decay + twice * pull));
    // <x, off> / square: of two balanced copies it is the part of x that points away from the plane.
    T radial = N == 2 && BALANCED ? T(1.4142135623730951) * (T(a[1] > 0) - T(a[1] < 0)) * b[1]
                                  : WHOLE<N> * dot(a, b) / larger(square, Law<T>::smallest);
    T own = t * decay + t * forth * radial, shrink = t * decay, lost = own * shrink - own - shrink;
    T shift = (1 - own) * square * (t * forth), glide = forth * u_mean;
    EACH_COPY {
      b[j] = lost * a[j] - shift * b[j];
      a[j] += b[j];
    }
    T far = length(a), on = w_mean - glide;
    bool snapped = (far <= snap) & (pull < decay);
    EACH_COPY c.w[j][i] = snapped ? on : w[j] - glide + b[j];
    far = (snapped | !(far <= Law<T>::largest)) ? T(0) : far;
    sum += far, squares += far * far;
  }
  tally.add(sum, squares, 0);
  s.all += all;
  keep_most<N>(s, most, drives);
  return apart;
}

#undef EACH_COPY
#undef LOOP
