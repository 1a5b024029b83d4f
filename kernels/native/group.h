// Groups of weights that share one gate, stripe by stripe: survey, combine, move.
//
// A stripe is one group whose members form long runs, or neighbouring groups with short ones, summed column by column.

#pragma once

#include "block.h"

namespace symopt {
namespace {

// What is summed beside g^2, u being the update up to a factor per group: u^2, u w, w^2; or with MEANS u, w, u^2.
template <bool MEANS, class T> [[gnu::always_inline]] inline T term_1(T u, T) { return MEANS ? u : u * u; }
template <bool MEANS, class T> [[gnu::always_inline]] inline T term_2(T u, T w) { return MEANS ? w : u * w; }
template <bool MEANS, class T> [[gnu::always_inline]] inline T term_3(T u, T w) { return MEANS ? u * u : w * w; }

// Adds the four sums of a block of one group.  Up to EXACT members are summed in the weight's own precision, in many
// lanes; `combine` knows what that leaves uncertain.
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

// The same for n columns of ROWS rows (1 or 4), added to sums[0..3][column]: the sums are read once for several rows.
template <class T, bool ADAPTIVE, bool MEANS, int ROWS>
LOOP void add_columns(int64_t n, const T* const* g, const T* const* u, const T* const* w, T* __restrict sums,
                      int64_t stride) {
  T *gg = sums, *sum_1 = sums + stride, *sum_2 = sums + 2 * stride, *sum_3 = sums + 3 * stride;
  constexpr int second = ROWS > 1 ? 1 : 0, third = ROWS > 1 ? 2 : 0, fourth = ROWS > 1 ? 3 : 0;
  const T *g0 = g[0], *u0 = u[0], *w0 = w[0], *g1 = g[second], *u1 = u[second], *w1 = w[second];
  const T *g2 = g[third], *u2 = u[third], *w2 = w[third], *g3 = g[fourth], *u3 = u[fourth], *w3 = w[fourth];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    T a = ADAPTIVE ? gg[i] + g0[i] * g0[i] : T(0), b = sum_1[i], c = sum_2[i], d = sum_3[i];
    b += term_1<MEANS>(u0[i], w0[i]), c += term_2<MEANS>(u0[i], w0[i]), d += term_3<MEANS>(u0[i], w0[i]);
    if (ROWS > 1) {
      if (ADAPTIVE) a += g1[i] * g1[i];
      b += term_1<MEANS>(u1[i], w1[i]), c += term_2<MEANS>(u1[i], w1[i]), d += term_3<MEANS>(u1[i], w1[i]);
      if (ADAPTIVE) a += g2[i] * g2[i];
      b += term_1<MEANS>(u2[i], w2[i]), c += term_2<MEANS>(u2[i], w2[i]), d += term_3<MEANS>(u2[i], w2[i]);
      if (ADAPTIVE) a += g3[i] * g3[i];
      b += term_1<MEANS>(u3[i], w3[i]), c += term_2<MEANS>(u3[i], w3[i]), d += term_3<MEANS>(u3[i], w3[i]);
    }
    if (ADAPTIVE) gg[i] = a;
    sum_1[i] = b, sum_2[i] = c, sum_3[i] = d;
  }
}

// The steps of n groups from their four sums: `adam` of kernels/reference with a second moment per group, then its
// `group`.
template <class T, int DIRECTION>
LOOP void combine_sums(int64_t n, T* __restrict second, T* __restrict peak, const double* __restrict counts,
                       const double* __restrict gg, const double* __restrict uu, const double* __restrict uw,
                       const double* __restrict ww, T* __restrict shrink, T* __restrict shift,
                       double* __restrict decays, const StepConstants<double>& k, Tally& tally) {
  constexpr double NOISE = sizeof(T) == 4 ? 4e-6 : 4e-14, TINY = StepConstants<T>::smallest;
  const double kept = k.decay_kept, pruned = k.decay_pruned, threshold = k.threshold, snap_limit = k.snap_limit;
  const double c = k.imbalance, scale = k.metric_scale, share2 = k.one_minus_beta2, beta2 = k.beta2, eps = k.eps;
  const double correction1 = k.bias_correction1, correction2 = k.bias_correction2;
  const bool saturated = k.saturated, amsgrad = peak != nullptr;
  double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t j = 0; j < n; j++) {
    double lr = k.lr, gain = 1, count = counts[j];
    if (DIRECTION != SGD) {
      double v = beta2 * second[j] + share2 * (gg[j] / larger(count, 1.0));
      second[j] = T(v);
      if (amsgrad) {
        double highest = peak[j];
        v = v <= highest ? highest : v;
        peak[j] = T(v);
      }
      double p = 1 / (root(v * correction2) + eps);
      lr *= p * correction1;
      gain = DIRECTION == ADAM ? p : root(count);
    }
    double norm = root(ww[j]), decay = (norm <= threshold ? pruned : kept) * gain;
    double metric = root(c * c + 4 * ww[j]), pull = lr * root(uu[j]);
    double most = saturated ? larger(metric, larger(scale, decay + 2 * pull)) : larger(decay, 1.0);
    double t = 1 / most, gate_sq = (c + metric) / 2, rho = 1 - t * decay;
    double gate = rho - t * lr * uw[j] / larger(gate_sq, TINY);
    double a = gate * rho, b = gate * gate_sq * t * lr;
    // A group must not snap because two large terms cancel to within their rounding.
    double terms = a * a * ww[j] + b * b * uu[j], rest = terms - 2 * a * b * uw[j];
    double far = root(rest < NOISE * terms ? NOISE * terms : rest);
    bool small = far <= SNAP * scale, may_snap = norm <= snap_limit;
    bool overflows = !(far <= StepConstants<double>::largest);
    bool snapped = small & (pull < decay) & may_snap;
    bool stays = small & !may_snap & (far < norm);  // what lives within a budget does not vanish
    double counted = (snapped | overflows) ? 0.0 : stays ? norm : far;
    sum += counted;
    square += counted * counted;
    shrink[j] = snapped ? T(0) : stays ? T(1) : T(a);
    shift[j] = (snapped | stays) ? T(0) : T(b);
    decays[j] = decay;
  }
  tally.add(sum, square, 0);
}

// w' = shrink w - shift u, once the two numbers of a group are known (a group that snaps takes 0 of both).
template <class T> LOOP int32_t move_group(int64_t n, T* __restrict w, const T* __restrict u, T shrink, T shift) {
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = shrink * w[i] - shift * u[i] + T(0);
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

template <class T>
LOOP int32_t move_columns(int64_t n, T* __restrict w, const T* __restrict u, const T* __restrict shrink,
                          const T* __restrict shift) {
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) {
    T x = shrink[i] * w[i] - shift[i] * u[i] + T(0);
    w[i] = x;
    zeros += x == 0;
  }
  return zeros;
}

// Calls f(offset, length) for the blocks of [begin, end), which counts the stripe's elements row by row.
template <class F> void walk(const Stripe& stripe, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / stripe.width, column = i % stripe.width;
    const int64_t n = smaller(smaller(stripe.width - column, BLOCK), end - i);
    f(stripe.base + row * stripe.row_stride + column, n);
    i += n;
  }
}

template <class T> auto sums_loop(bool adaptive, bool means) {
  return means ? (adaptive ? add_sums<T, true, true> : add_sums<T, false, true>)
               : (adaptive ? add_sums<T, true, false> : add_sums<T, false, false>);
}

template <class T, int ROWS> auto columns_loop(bool adaptive, bool means) {
  return means ? (adaptive ? add_columns<T, true, true, ROWS> : add_columns<T, false, true, ROWS>)
               : (adaptive ? add_columns<T, true, false, ROWS> : add_columns<T, false, false, ROWS>);
}

// `sums` is [4] for one group with long runs, [4][width] for neighbouring ones, [5][groups] for an index (the fifth
// counts members).
template <class T>
void survey_group(const Entry& e, const StepConstants<T>& k, const Stripe& stripe, int64_t begin, int64_t end,
                  double* sums, bool means) {
  const auto add = sums_loop<T>(k.direction != SGD, means);
  Block<T> b;
  walk(stripe, begin, end, [&](int64_t at, int64_t n) {
    prefetch_block<T>(e, at + n, e.numel, true);
    b.open(e, k, at, n);
    b.direct(e, k);
    if (!e.index) return add(n, b.g, b.u, b.w, sums);
    for (int64_t i = 0; i < n; i++) {
      double *s = sums + e.index[at + i], x = b.g[i], y = b.u[i], z = b.w[i];
      s[0] += x * x, s[e.groups] += y * y, s[2 * e.groups] += y * z, s[3 * e.groups] += z * z, s[4 * e.groups] += 1;
    }
  });
}

template <class T>
void survey_columns(const Entry& e, const StepConstants<T>& k, const Stripe& stripe, int64_t begin, int64_t end,
                    double* sums, bool means) {
  constexpr int64_t ROWS = 4, PRECISE = 32;  // rows added at once, and rows added before their sum goes to double
  const bool adaptive = k.direction != SGD;
  const auto add_four = columns_loop<T, ROWS>(adaptive, means), add_one = columns_loop<T, 1>(adaptive, means);
  Block<T> b[ROWS];
  T columns[4 * MAX_STRIPE];
  const int64_t last = end / stripe.width;
  for (int64_t top = begin / stripe.width; top < last; top += PRECISE) {
    fill(columns, 4 * stripe.width, T(0));
    const int64_t bottom = smaller(last, top + PRECISE);
    for (int64_t row = top; row < bottom; row += ROWS)
      for (int64_t column = 0; column < stripe.width; column += BLOCK) {
        const int64_t n = smaller(BLOCK, stripe.width - column), rows = smaller(ROWS, bottom - row);
        const T *g[ROWS], *u[ROWS], *w[ROWS];
        for (int64_t r = 0; r < rows; r++) {
          const int64_t at = stripe.base + (row + r) * stripe.row_stride + column;
          prefetch_block<T>(e, at + ROWS * stripe.row_stride, e.numel, true);
          b[r].open(e, k, at, n);
          b[r].direct(e, k);
          g[r] = b[r].g, u[r] = b[r].u, w[r] = b[r].w;
        }
        if (rows == ROWS) add_four(n, g, u, w, columns + column, stripe.width);
        else
          for (int64_t r = 0; r < rows; r++) add_one(n, g + r, u + r, w + r, columns + column, stripe.width);
      }
    for (int64_t i = 0; i < 4 * stripe.width; i++) sums[i] += columns[i];
  }
}

template <class T>
void survey(const Entry& e, const StepConstants<double>& k, const Stripe& stripe, int64_t begin, int64_t end,
            double* sums, bool means) {
  const auto f = !e.index && stripe.groups > 1 ? survey_columns<T> : survey_group<T>;
  f(e, StepConstants<T>(k), stripe, begin, end, sums, means);
}

// From sums of `parts` parts, `size` apart: the two numbers of every group of the stripe.  `counts` has the sizes of
// groups that are given one by one (with sums[q][group]); without, all groups have that of the stripe.
template <class T>
void combine(const Entry& e, const StepConstants<double>& k, const Stripe& stripe, double* sums, int64_t parts,
             int64_t size, const double* counts, void* shrink_out, void* shift_out, Tally& tally, double* sample,
             int64_t stride) {
  T *shrink = static_cast<T*>(shrink_out), *shift = static_cast<T*>(shift_out);
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[p * size + i];
  constexpr int64_t AT_ONCE = 64;
  const bool direct = counts || stripe.run == 1 || stripe.groups == 1;
  const int64_t pitch = counts ? stripe.groups : stripe.groups == 1 ? 1 : stripe.width;
  double same[AT_ONCE];
  if (!counts) fill(same, AT_ONCE, double(stripe.rows) * double(stripe.run));
  const auto loop = k.direction == SGD    ? combine_sums<T, SGD>
                    : k.direction == ADAM ? combine_sums<T, ADAM>
                                          : combine_sums<T, ADAMW>;
  for (int64_t j = 0; j < stripe.groups; j += AT_ONCE) {
    const int64_t n = smaller(AT_ONCE, stripe.groups - j), group = stripe.group + j;
    double folded[4][AT_ONCE], decays[AT_ONCE];
    const double* s[4];
    for (int q = 0; q < 4; q++) {
      s[q] = direct ? sums + q * pitch + j : folded[q];
      for (int64_t i = 0; i < (direct ? 0 : n); i++) {
        const double* from = sums + q * pitch + (j + i) * stripe.run;
        folded[q][i] = 0;
        for (int64_t r = 0; r < stripe.run; r++) folded[q][i] += from[r];
      }
    }
    T own_shrink[AT_ONCE], own_shift[AT_ONCE];
    T *to_shrink = direct ? shrink + j : own_shrink, *to_shift = direct ? shift + j : own_shift;
    T *second = static_cast<T*>(e.second) + group, *peak = e.peak ? static_cast<T*>(e.peak) + group : nullptr;
    loop(n, second, peak, counts ? counts + j : same, s[0], s[1], s[2], s[3], to_shrink, to_shift, decays, k, tally);
    for (int64_t i = 0; i < (direct ? 0 : n); i++)
      for (int64_t r = 0; r < stripe.run; r++) {
        shrink[(j + i) * stripe.run + r] = own_shrink[i];
        shift[(j + i) * stripe.run + r] = own_shift[i];
      }
    if (sample)
      for (int64_t i = 0; i < n; i++)
        if ((group + i) % stride == 0) sample[(group + i) / stride] = decays[i];
  }
}

template <class T>
void move(const Entry& e, const StepConstants<double>& constants, const Stripe& stripe, int64_t begin, int64_t end,
          const void* shrink_of, const void* shift_of, Tally& tally) {
  const StepConstants<T> k(constants);
  const T *shrink = static_cast<const T*>(shrink_of), *shift = static_cast<const T*>(shift_of);
  Block<T> b;
  walk(stripe, begin, end, [&](int64_t at, int64_t n) {
    b.recall(e, k, at, n);
    int32_t zeros = 0;
    if (e.index) {
      T own_shrink[BLOCK], own_shift[BLOCK];
      const int64_t* index = e.index + at;
      for (int64_t i = 0; i < n; i++) own_shrink[i] = shrink[index[i]], own_shift[i] = shift[index[i]];
      zeros = move_columns(n, b.w, b.u, own_shrink, own_shift);
    } else if (stripe.groups == 1) {
      zeros = move_group(n, b.w, b.u, shrink[0], shift[0]);
    } else {
      const int64_t column = (at - stripe.base) % stripe.row_stride;
      zeros = move_columns(n, b.w, b.u, shrink + column, shift + column);
    }
    tally.zeros += b.close(e, zeros);
  });
}

}  // namespace
}  // namespace symopt
