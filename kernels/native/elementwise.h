// The arithmetic of the constrained step, on blocks of contiguous weights.
//
// native.cpp includes this file once per instruction set, inside a namespace: one source, compiled for each.  The
// formulas and names are kernels/reference.py's.  m directions and n retractions are m + n functions that meet in a
// buffer in L1; that is faster than one loop per pair, because a single loop's chain of two roots and two divisions
// is too long for a core to overlap.  Loops are plain and vectorized by the compiler; -fopenmp-simd lets it reorder the
// marked sums and nothing else.

// Out of line, because GCC forgets `restrict` and with it the vectors when it inlines one into a bigger function.
#define LOOP [[gnu::noinline]] static

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }
static inline float size(float x) { return __builtin_fabsf(x); }
static inline double size(double x) { return __builtin_fabs(x); }
template <class T> static inline T larger(T a, T b) { return a > b ? a : b; }
template <class T> static inline T smaller(T a, T b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------- storage formats

LOOP void load(int64_t n, const Bfloat* from, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

LOOP void load(int64_t n, const Half* from, float* to) {
  int64_t i = 0;
#ifdef SYMOPT_F16C
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) to[i] = widen(from[i]);
}

LOOP void store(int64_t n, const float* from, Bfloat* to) {
  for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
}

LOOP void store(int64_t n, const float* from, Half* to) {
  int64_t i = 0;
#ifdef SYMOPT_F16C
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) narrow(from[i], to[i]);
}

// ------------------------------------------------------------------------------------------------------ directions

template <class T>
LOOP void prepare(int64_t n, const T* g, const T* w, T* to, T factor, T weight_decay) {
  for (int64_t i = 0; i < n; i++) to[i] = factor * g[i] + weight_decay * w[i];
}

template <class T, bool NESTEROV, bool FRESH>
LOOP void sgd(int64_t n, const T* __restrict g, T* __restrict buffer, T* __restrict update, T momentum, T undamped) {
  for (int64_t i = 0; i < n; i++) {
    T b = FRESH ? g[i] : momentum * buffer[i] + undamped * g[i];
    buffer[i] = b;
    if (NESTEROV) update[i] = g[i] + momentum * b;
  }
}

template <class T> LOOP void first_moment(int64_t n, const T* __restrict g, T* __restrict exp_avg, T fresh) {
  for (int64_t i = 0; i < n; i++) exp_avg[i] = exp_avg[i] + fresh * (g[i] - exp_avg[i]);
}

template <class T, bool AMSGRAD>
LOOP void adam_loop(int64_t n, const T* __restrict g, T* __restrict exp_avg, T* __restrict exp_avg_sq,
                    T* __restrict peak, T* __restrict update, T* __restrict gain, const Law<T>& k) {
  const T fresh1 = k.fresh1, beta2 = k.beta2, fresh2 = k.fresh2, unbias1 = k.unbias1, unbias2 = k.unbias2, eps = k.eps;
  for (int64_t i = 0; i < n; i++) {
    T m = exp_avg[i] + fresh1 * (g[i] - exp_avg[i]), v = beta2 * exp_avg_sq[i] + fresh2 * (g[i] * g[i]);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (AMSGRAD) {
      v = v <= peak[i] ? peak[i] : v;
      peak[i] = v;
    }
    T p = 1 / (root(v * unbias2) + eps);
    gain[i] = p;
    update[i] = p * (m * unbias1);
  }
}

template <class T>
static void adam(int64_t n, const T* g, T* exp_avg, T* exp_avg_sq, T* peak, T* update, T* gain, const Law<T>& k) {
  (peak ? adam_loop<T, true> : adam_loop<T, false>)(n, g, exp_avg, exp_avg_sq, peak, update, gain, k);
}

// ----------------------------------------------------------------------------------------------------- retractions

// Each returns how many weights are zero now; `sparse` also adds up their sizes, for the imbalance law.

template <class T> LOOP int32_t plain(int64_t n, T* __restrict w, const T* __restrict update, const Law<T>& k) {
  const T keep = 1 - k.inside, lr = k.lr;
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = keep * w[i] - lr * update[i];
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

template <class T> static void add_finite(int64_t n, const T* w, Tally& tally) {
  for (int64_t i = 0; i < n; i++)
    if (size(w[i]) <= Law<T>::largest) tally.add(size(w[i]), w[i] * w[i], 0);
}

// The next function of four neighbours at once, in one vector that rotations bring to the others (2:4 on AVX2: an
// eighth of the time).
template <class T>
LOOP void rank_four(int64_t n, const T* __restrict w, T* __restrict decays, int keep, T inside, T outside) {
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  typedef Index Lanes __attribute__((vector_size(4 * sizeof(T))));
#if defined(__clang__)
#define SYMOPT_TURN(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#else
#define SYMOPT_TURN(x, a, b, c, d) __builtin_shuffle(x, Lanes{a, b, c, d})
#endif
  const Lanes most = Lanes{} + Index(keep);
  const Four lives = Four{} + inside, goes = Four{} + outside;
  for (int64_t i = 0; i < n; i += 4) {
    Four x;
    __builtin_memcpy(&x, w + i, sizeof x);
    const Four mine = x < 0 ? -x : x;
    const Four next = SYMOPT_TURN(mine, 1, 2, 3, 0), far = SYMOPT_TURN(mine, 2, 3, 0, 1), last = SYMOPT_TURN(mine, 3, 0, 1, 2);
    // Truth is -1 in every lane; of equal ones those that lie before count.
    const Lanes ahead = (next > mine) + (far > mine) + (last > mine) + ((next == mine) & Lanes{0, 0, 0, -1}) +
                        ((far == mine) & Lanes{0, 0, -1, -1}) + ((last == mine) & Lanes{0, -1, -1, -1});
    const Four decay = -ahead < most ? lives : goes;
    __builtin_memcpy(decays + i, &decay, sizeof decay);
  }
#undef SYMOPT_TURN
}

// N:M: the decays of n weights, `outside` for all but the `keep` largest of every `of`; of equal sizes the first counts.
template <class T>
LOOP void rank(int64_t n, const T* __restrict w, T* __restrict decays, int keep, int of, T inside, T outside) {
  if (of == 4) return rank_four(n, w, decays, keep, inside, outside);
  for (int64_t i = 0; i < n; i += of)
    for (int j = 0; j < of; j++) {
      int larger_ones = 0;
      for (int l = 0; l < of; l++) {
        T mine = size(w[i + j]), other = size(w[i + l]);
        larger_ones += (other > mine) | ((other == mine) & (l < j));
      }
      decays[i + j] = larger_ones < keep ? inside : outside;
    }
}

// Where a weight's decay comes from: the threshold alone, times the preconditioner in `gain`, or `rank`, via `gain`.
enum Source { UNIFORM, COUPLED, PATTERN };

template <class T> static Source source(const Law<T>& k) {
  return k.of ? PATTERN : k.direction == ADAM ? COUPLED : UNIFORM;
}

template <class T, Source SOURCE, bool SATURATED>
LOOP int32_t sparse_loop(int64_t n, T* __restrict w, const T* __restrict update, const T* __restrict gain,
                           const Law<T>& k, Tally& tally) {
  const T lr = k.lr, inside = k.inside, outside = k.outside, threshold = k.threshold, scale = k.metric_scale;
  const T square_c = k.imbalance * k.imbalance, snap = T(SNAP) * scale, most = k.snaps;
  T sum = 0, square = 0;
  int32_t zeros = 0;
#pragma omp simd reduction(+ : sum, square, zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = w[i], delta = lr * update[i], decay = size(x) <= threshold ? outside : inside;
    if (SOURCE == COUPLED) decay = decay * gain[i];
    if (SOURCE == PATTERN) decay = gain[i];
    bool may_snap = SOURCE == PATTERN ? decay == outside : size(x) <= most;
    T old = x, pull = size(delta), metric = root(square_c + (x + x) * (x + x));
    T limit = (pull < decay) & may_snap ? snap : T(0), least = may_snap ? T(0) : smaller(snap, size(x));
    T t = SATURATED ? 1 / larger(metric, larger(scale, decay + 2 * pull)) : 1 / larger(decay, T(1));
    delta = t * delta;
    T rho = 1 - t * decay;
    x = (rho * rho + delta * delta) * x - rho * delta * metric;
    x = size(x) < least ? old : x;  // what lives within a budget does not vanish
    T far = size(x);
    sum += far;
    square += far * far;
    zeros += far <= limit;
    w[i] = far <= limit ? T(0) : x;
  }
  if (square <= Law<T>::largest) tally.add(sum, square, 0);
  else add_finite(n, w, tally);
  return zeros;
}

template <class T>
static int32_t sparse(int64_t n, T* w, const T* update, const T* gain, const Law<T>& k, Tally& tally) {
  const Source from = source(k);
  auto loop = from == COUPLED   ? (k.saturated ? sparse_loop<T, COUPLED, true> : sparse_loop<T, COUPLED, false>)
              : from == PATTERN ? (k.saturated ? sparse_loop<T, PATTERN, true> : sparse_loop<T, PATTERN, false>)
                                : (k.saturated ? sparse_loop<T, UNIFORM, true> : sparse_loop<T, UNIFORM, false>);
  return loop(n, w, update, gain, k, tally);
}

// With REBALANCE every a^2 - b^2 is first multiplied by `keep` at the same product, in closed form.
template <class T, Source SOURCE, bool SATURATED, bool REBALANCE>
LOOP int32_t sparse_free_loop(int64_t n, T* __restrict w, T* __restrict factor_0, T* __restrict factor_1,
                                const T* __restrict update, const T* __restrict gain, const Law<T>& k) {
  const T lr = k.lr, inside = k.inside, outside = k.outside, threshold = k.threshold, scale = k.metric_scale;
  const T snap = T(SNAP) * scale, keep_imbalance = k.imbalance_factor, most = k.snaps;
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T stored_a = factor_0[i], stored_b = factor_1[i], old = w[i], a = stored_a, b = stored_b;
    if (REBALANCE) {
      T product = size(a * b), c = keep_imbalance * ((a - b) * (a + b));
      T high = root((size(c) + root(c * c + 4 * product * product)) / 2), low = high > 0 ? product / high : T(0);
      T new_a = c >= 0 ? high : low, new_b = c >= 0 ? low : high;
      a = a < 0 ? -new_a : new_a;
      b = b < 0 ? -new_b : new_b;
    }
    T delta = lr * update[i], decay = size(old) <= threshold ? outside : inside;
    if (SOURCE == COUPLED) decay = decay * gain[i];
    if (SOURCE == PATTERN) decay = gain[i];
    bool may_snap = SATURATED & (SOURCE == PATTERN ? decay == outside : size(old) <= most);
    T pull = size(delta), limit = (pull < decay) & may_snap ? snap : T(-1);
    T t = SATURATED ? 1 / larger(b * b + a * a, larger(scale, decay + 2 * pull)) : 1 / larger(decay, T(1));
    delta = t * delta;
    T rho = 1 - t * decay, u = rho * a - delta * b, v = rho * b - delta * a, x = u * v;
    bool snapped = size(x) <= limit, light = size(u) <= size(v), still = (u == a) & (v == b);
    u = still ? stored_a : u;
    v = still ? stored_b : v;
    factor_0[i] = (snapped & light) ? T(0) : u;
    factor_1[i] = (snapped & !light) ? T(0) : v;
    x = still ? old : x;
    x = snapped ? T(0) : x;
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

template <class T, Source SOURCE>
static int32_t sparse_free_as(int64_t n, T* w, T* factor_0, T* factor_1, const T* update, const T* gain,
                              const Law<T>& k) {
  const bool rebalance = k.imbalance_factor >= 0;
  auto loop = k.saturated
                  ? (rebalance ? sparse_free_loop<T, SOURCE, true, true> : sparse_free_loop<T, SOURCE, true, false>)
                  : (rebalance ? sparse_free_loop<T, SOURCE, false, true> : sparse_free_loop<T, SOURCE, false, false>);
  return loop(n, w, factor_0, factor_1, update, gain, k);
}

template <class T>
static int32_t sparse_free(int64_t n, T* w, T* factor_0, T* factor_1, const T* update, const T* gain, const Law<T>& k) {
  const Source from = source(k);
  auto as = from == COUPLED ? sparse_free_as<T, COUPLED> : from == PATTERN ? sparse_free_as<T, PATTERN>
                                                                           : sparse_free_as<T, UNIFORM>;
  return as(n, w, factor_0, factor_1, update, gain, k);
}

// Factors that compose to the weight in its storage format W; where somebody changed the weight they are split anew.
template <class T, class W>
static void mend(int64_t n, const T* __restrict w, T* __restrict factor_0, T* __restrict factor_1, T imbalance) {
  T product[BLOCK];
  int32_t stale = 0;
  for (int64_t i = 0; i < n; i++) product[i] = factor_0[i] * factor_1[i];
  if constexpr (!std::is_same<T, W>::value) {
    W rounded[BLOCK];
    store(n, product, rounded);
    load(n, rounded, product);
  }
#pragma omp simd reduction(+ : stale)
  for (int64_t i = 0; i < n; i++) stale += product[i] != w[i];
  if (!stale) return;
  for (int64_t i = 0; i < n; i++) {
    if (product[i] == w[i]) continue;
    T heavy = root((imbalance + root(imbalance * imbalance + 4 * w[i] * w[i])) / 2);
    factor_0[i] = heavy;
    factor_1[i] = heavy > 0 ? w[i] / heavy : T(0);
  }
}

// --------------------------------------------------------------------------------------------------- group members

// What is summed beside g^2, u being the update up to a factor per group: u^2, u w, w^2; or with MEANS u, w, u^2.
template <bool MEANS, class T> [[gnu::always_inline]] static inline T term_1(T u, T) { return MEANS ? u : u * u; }
template <bool MEANS, class T> [[gnu::always_inline]] static inline T term_2(T u, T w) { return MEANS ? w : u * w; }
template <bool MEANS, class T> [[gnu::always_inline]] static inline T term_3(T u, T w) { return MEANS ? u * u : w * w; }

// Adds the four sums of a block of one group.  Up to EXACT members are summed in the weight's own precision, in many lanes;
// `decide` knows what that leaves uncertain.
template <class T, bool ADAPTIVE, bool MEANS>
LOOP void add_sums(int64_t n, const T* g, const T* u, const T* w, double* sums) {
  constexpr int64_t EXACT = 256;
  for (int64_t start = 0; start < n; start += EXACT) {
    const int64_t end = n - start < EXACT ? n : start + EXACT;
    T gg = 0, a = 0, b = 0, c = 0;
#pragma omp simd reduction(+ : gg, a, b, c)
    for (int64_t i = start; i < end; i++) {
      if (ADAPTIVE) gg += g[i] * g[i];
      a += term_1<MEANS>(u[i], w[i]), b += term_2<MEANS>(u[i], w[i]), c += term_3<MEANS>(u[i], w[i]);
    }
    sums[0] += gg, sums[1] += a, sums[2] += b, sums[3] += c;
  }
}

// The same for n columns of ROWS rows at once, added to sums[0..3][column]: several rows to one visit of the sums.
template <class T, bool ADAPTIVE, bool MEANS, int ROWS>
LOOP void add_columns(int64_t n, const T* const* g, const T* const* u, const T* const* w, T* __restrict sums,
                      int64_t stride) {
  T *gg = sums, *sum_1 = sums + stride, *sum_2 = sums + 2 * stride, *sum_3 = sums + 3 * stride;
  const T *g0 = g[0], *u0 = u[0], *w0 = w[0], *g1 = g[ROWS > 1], *u1 = u[ROWS > 1], *w1 = w[ROWS > 1];
  const T *g2 = g[ROWS > 2 ? 2 : 0], *u2 = u[ROWS > 2 ? 2 : 0], *w2 = w[ROWS > 2 ? 2 : 0];
  const T *g3 = g[ROWS > 3 ? 3 : 0], *u3 = u[ROWS > 3 ? 3 : 0], *w3 = w[ROWS > 3 ? 3 : 0];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    T a = ADAPTIVE ? gg[i] + g0[i] * g0[i] : T(0), b = sum_1[i], c = sum_2[i], d = sum_3[i];
    b += term_1<MEANS>(u0[i], w0[i]), c += term_2<MEANS>(u0[i], w0[i]), d += term_3<MEANS>(u0[i], w0[i]);
    if (ROWS > 1) {
      if (ADAPTIVE) a += g1[i] * g1[i];
      b += term_1<MEANS>(u1[i], w1[i]), c += term_2<MEANS>(u1[i], w1[i]), d += term_3<MEANS>(u1[i], w1[i]);
    }
    if (ROWS > 2) {
      if (ADAPTIVE) a += g2[i] * g2[i];
      b += term_1<MEANS>(u2[i], w2[i]), c += term_2<MEANS>(u2[i], w2[i]), d += term_3<MEANS>(u2[i], w2[i]);
    }
    if (ROWS > 3) {
      if (ADAPTIVE) a += g3[i] * g3[i];
      b += term_1<MEANS>(u3[i], w3[i]), c += term_2<MEANS>(u3[i], w3[i]), d += term_3<MEANS>(u3[i], w3[i]);
    }
    if (ADAPTIVE) gg[i] = a;
    sum_1[i] = b, sum_2[i] = c, sum_3[i] = d;
  }
}

// The steps of n groups from their four sums: reference.py's `adam` with a shared second moment, then its `group`.
// `counts` holds one size per group, or one for all if there is only one.
template <class T, int DIRECTION, bool ONE_SIZE>
LOOP void decide(int64_t n, T* __restrict second, T* __restrict peak, const double* __restrict counts,
                   const double* __restrict gg, const double* __restrict uu, const double* __restrict uw,
                   const double* __restrict ww, T* __restrict keep, T* __restrict shift, double* __restrict decays,
                   const Law<double>& k, Tally& tally) {
  constexpr double NOISE = sizeof(T) == 4 ? 4e-6 : 4e-14, TINY = Law<T>::smallest;
  const double inside = k.inside, outside = k.outside, threshold = k.threshold, c = k.imbalance, scale = k.metric_scale;
  const double most_snaps = k.snaps, fresh2 = k.fresh2, beta2 = k.beta2, unbias1 = k.unbias1, unbias2 = k.unbias2, eps = k.eps;
  const bool saturated = k.saturated, amsgrad = peak != nullptr;
  double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t j = 0; j < n; j++) {
    double lr = k.lr, gain = 1, count = ONE_SIZE ? counts[0] : counts[j];
    if (DIRECTION != SGD) {
      double v = beta2 * second[j] + fresh2 * (gg[j] / count);
      second[j] = T(v);
      if (amsgrad) {
        double highest = peak[j];
        v = v <= highest ? highest : v;
        peak[j] = T(v);
      }
      double p = 1 / (root(v * unbias2) + eps);
      lr *= p * unbias1;
      gain = DIRECTION == ADAM ? p : root(count);
    }
    double norm = root(ww[j]), decay = (norm <= threshold ? outside : inside) * gain;
    double metric = root(c * c + 4 * ww[j]), pull = lr * root(uu[j]);
    double most = saturated ? larger(metric, larger(scale, decay + 2 * pull)) : larger(decay, 1.0);
    double t = 1 / most, gate_sq = (c + metric) / 2, rho = 1 - t * decay;
    double shared = rho - t * lr * uw[j] / larger(gate_sq, TINY);
    double a = shared * rho, b = shared * gate_sq * t * lr;
    // A group must not snap because two large terms cancel to within their rounding.
    double terms = a * a * ww[j] + b * b * uu[j], rest = terms - 2 * a * b * uw[j];
    double far = root(rest < NOISE * terms ? NOISE * terms : rest);
    bool small = far <= SNAP * scale, may_snap = norm <= most_snaps, lost = !(far <= Law<double>::largest);
    bool snapped = small & (pull < decay) & may_snap;
    bool stays = small & !may_snap & (far < norm);  // what lives within a budget does not vanish
    double counted = (snapped | lost) ? 0.0 : stays ? norm : far;
    sum += counted;
    square += counted * counted;
    keep[j] = snapped ? T(0) : stays ? T(1) : T(a);
    shift[j] = (snapped | stays) ? T(0) : T(b);
    decays[j] = decay;
  }
  tally.add(sum, square, 0);
}

// w' = keep w - shift u, the group retraction once its two numbers are known (a group that snaps keeps 0 of both).
template <class T> LOOP int32_t move(int64_t n, T* __restrict w, const T* __restrict u, T keep, T shift) {
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = keep * w[i] - shift * u[i] + T(0);
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

template <class T>
LOOP int32_t move_columns(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict keep,
                            const T* __restrict shift) {
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = keep[i] * w[i] - shift[i] * u[i] + T(0);
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

#undef LOOP
