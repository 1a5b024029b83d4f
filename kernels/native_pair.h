// native_mirror.h for two copies, the usual tie, each sweep in one loop.
//
// Two weights are as far from their mean as half their difference, and seven streams that start at the same place of
// their pages leave a cache of eight ways no room for many arrays in between.

#define LOOP [[gnu::noinline]] static  // as in native_step.h

// Where the updates of the first sweep come from; those that are given are only read.
enum Lead { GIVEN, MOMENTUM, NESTEROV, MOMENTS, AMSGRAD };

// The first sweep of one block; `on` takes what the weights become if they are equal.  Returns how many are not.
template <class T, Lead LEAD>
LOOP int32_t survey_pair(int64_t n, const T* __restrict g0, const T* __restrict g1, T* __restrict u0, T* __restrict u1,
                         const T* __restrict w0, const T* __restrict w1, T* __restrict second, T* __restrict peak,
                         T* __restrict on, const Law<T>& k, Survey& s) {
  const T fresh1 = k.fresh1, beta2 = k.beta2, fresh2 = k.fresh2 / 2, unbias2 = k.unbias2, eps = k.eps, half = T(0.5);
  const T momentum = k.momentum, undamped = k.undamped;
  const T reach = k.lr * k.unbias1, scaled = k.direction == ADAMW ? T(1) : T(0);
  T ww = 0, uu = 0, uw = 0, dd = 0, dw = 0, all = 0, paces = 0, most = 0;
  int32_t apart = 0;
#pragma omp simd reduction(+ : ww, uu, uw, dd, dw, all, paces, apart) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    T x0 = u0[i], x1 = u1[i], p = 1;
    if (LEAD == MOMENTUM || LEAD == NESTEROV) {
      x0 = momentum * x0 + undamped * g0[i], x1 = momentum * x1 + undamped * g1[i];
      u0[i] = x0, u1[i] = x1;
      if (LEAD == NESTEROV) x0 = g0[i] + momentum * x0, x1 = g1[i] + momentum * x1;
    }
    if (LEAD == MOMENTS || LEAD == AMSGRAD) {
      x0 = x0 + fresh1 * (g0[i] - x0), x1 = x1 + fresh1 * (g1[i] - x1);
      u0[i] = x0, u1[i] = x1;
      T v = beta2 * second[i] + fresh2 * (g0[i] * g0[i] + g1[i] * g1[i]);
      second[i] = v;
      if (LEAD == AMSGRAD) {
        v = v <= peak[i] ? peak[i] : v;
        peak[i] = v;
      }
      T inverse = root(v * unbias2) + eps;
      paces += inverse;
      p = 1 / inverse;
    }
    T w = w1[i] - w0[i], x = x1 - x0, d = p * x, pull = scaled * d + (1 - scaled) * x;
    ww += w * w, uu += x * x, uw += x * w, dd += d * d, dw += d * w, all += x0 * x0 + x1 * x1;
    most = larger(pull * pull, most);
    apart += w0[i] != w1[i];
    on[i] = w0[i] + half * w - reach * p * (x0 + half * x);
  }
  s.ww += ww / 2, s.uu += uu / 2, s.uw += uw / 2, s.dd += dd / 2, s.dw += dw / 2, s.all += all, s.paces += paces;
  if (s.most == s.most) s.most = dd == dd ? std::max(s.most, double(most) / 2) : double(dd);  // NaN stays
  return apart;
}

// The second sweep under one gate; returns the squared distance from the plane.
template <class T, bool ADAPTIVE>
LOOP double move_pair(int64_t n, const T* __restrict u0, const T* __restrict u1, T* __restrict w0, T* __restrict w1,
                      const T* __restrict second, const Gate& gate, bool glided, const Law<T>& k) {
  const T unbias2 = k.unbias2, eps = k.eps, half = T(0.5), own = T(gate.own), rate = T(gate.t * k.inside);
  const bool coupled = ADAPTIVE && k.direction == ADAM;
  // A weight that has no gradient has a decay without bounds; its factor must not overshoot zero.
  const T most = 1 / rate, fits = coupled ? T(1) : 1 / larger(rate, T(1)), reach = k.lr * k.unbias1;
  const T back = T((1 - gate.own) * gate.square * gate.t) * reach * fits, forth = glided ? T(0) : reach;
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) {
    T p = ADAPTIVE ? 1 / (root(second[i] * unbias2) + eps) : T(1);
    T decay = smaller(coupled ? rate * p : rate, T(1)), lost = own * decay - own - decay;
    T off = half * (w1[i] - w0[i]), x = half * (u1[i] - u0[i]);
    T change = lost * off - back * (coupled ? smaller(p, most) : p) * x, glide = forth * p * (u0[i] + x);
    T rest = off + change;
    w0[i] = w0[i] - glide - change;
    w1[i] = w1[i] - glide + change;
    square += rest * rest;
  }
  return 2 * double(square);
}

// The second sweep with a gate for every orbit.  BALANCED: the imbalance is 0, and the metric 2 |w|.
template <class T, bool ADAPTIVE, bool BALANCED>
LOOP void move_pair_each(int64_t n, const T* __restrict u0, const T* __restrict u1, T* __restrict w0,
                         T* __restrict w1, const T* __restrict second, const Law<T>& k, Tally& tally) {
  const T unbias2 = k.unbias2, eps = k.eps, half = T(0.5), c = k.imbalance, scale = k.metric_scale, inside = k.inside;
  const T reach = k.lr * k.unbias1, snap = T(SNAP) * scale, diagonal = T(1.4142135623730951);
  const bool coupled = ADAPTIVE && k.direction == ADAM;
  // Without the time scale the largest of decay and 1, in the same words: a branch here costs GCC the vectors.
  const T scaled = k.saturated ? 1 : 0, twice = 2 * scaled, least = k.saturated ? scale : T(1);
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < n; i++) {
    T p = ADAPTIVE ? 1 / (root(second[i] * unbias2) + eps) : T(1), forth = reach * p;
    T off = half * (w1[i] - w0[i]), x = half * (u1[i] - u0[i]), norm = diagonal * size(off);
    T decay = coupled ? inside * p : inside, pull = forth * (diagonal * size(x));
    T metric = BALANCED ? 2 * norm : root(c * c + 4 * (norm * norm)), square = BALANCED ? norm : (c + metric) / 2;
    T t = 1 / larger(scaled * metric, larger(least, decay + twice * pull));
    // <x, off> / square, without imbalance the part of x that points away from the plane.
    T sign = T(off > 0) - T(off < 0);
    T radial = BALANCED ? diagonal * sign * x : 2 * x * off / larger(square, Law<T>::smallest);
    T own = t * decay + t * forth * radial, shrink = t * decay, lost = own * shrink - own - shrink;
    T change = lost * off - (1 - own) * square * (t * forth) * x, glide = forth * (u0[i] + x);
    T on = w0[i] + off - glide, rest = diagonal * size(off + change);
    bool snapped = (rest <= snap) & (pull < decay);
    T far = (snapped | !(rest <= Law<T>::largest)) ? T(0) : rest;
    sum += far, squares += far * far;
    w0[i] = snapped ? on : w0[i] - glide - change;
    w1[i] = snapped ? on : w1[i] - glide + change;
  }
  tally.add(sum, squares, 0);
}

#undef LOOP
