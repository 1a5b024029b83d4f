// The loops that one core computes more slowly than memory delivers, for AVX-512 and float.
//
// A hardware root and division keep one unit busy for 16 cycles per sixteen weights (Zen 4) that nothing else can use.
// Here inverses start from the processor's 14-bit estimate and take one Newton step on the multipliers, which leaves
// about 1 ulp.  What remains is bound by the multipliers: more unrolling, shorter chains and two loops instead of one
// changed nothing (benchmarks/steps/loops.py).

#pragma once

#include "elementwise.h"

namespace symopt {
namespace {

struct All {
  __m512 load(const float* p) const { return _mm512_loadu_ps(p); }
  void store(float* p, __m512 x) const { _mm512_storeu_ps(p, x); }
  __mmask16 of(__mmask16 lanes) const { return lanes; }
};
struct Some {
  __mmask16 mask;
  __m512 load(const float* p) const { return _mm512_maskz_loadu_ps(mask, p); }
  void store(float* p, __m512 x) const { _mm512_mask_storeu_ps(p, mask, x); }
  __mmask16 of(__mmask16 lanes) const { return lanes & mask; }
};

// Calls body(i, lanes) for sixteen weights at a time; masks cost a tenth, so only the last call has one.
template <class Body> inline void for_sixteen(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(i, All());
  if (i < n) body(i, Some{__mmask16((1u << (n - i)) - 1)});
}

inline __m512 size(__m512 x) { return _mm512_abs_ps(x); }

struct Roots {
  __m512 root, inverse;
};

// sqrt(a) and 1 / sqrt(a) for finite a >= 0; the root of 0 is 0, its inverse merely large.
inline Roots roots(__m512 a) {
  const __m512 half = _mm512_set1_ps(0.5f), tiny = _mm512_set1_ps(StepConstants<float>::smallest);
  const __m512 r = _mm512_rsqrt14_ps(_mm512_max_ps(a, tiny)), s = _mm512_mul_ps(a, r);
  const __m512 e = _mm512_fnmadd_ps(_mm512_mul_ps(half, r), s, half);
  return {_mm512_fmadd_ps(s, e, s), _mm512_fmadd_ps(r, e, r)};
}

// 1 / a; the error term of 0 and infinity is NaN, which min turns into 1, and their estimates stay what they are.
inline __m512 inverse(__m512 a) {
  const __m512 one = _mm512_set1_ps(1.0f), p = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(p, _mm512_min_ps(_mm512_fnmadd_ps(a, p, one), one), p);
}

// BALANCED: the imbalance is 0, as it is for most of training.  Then the metric is 2 |w|, and the law needs no sizes.
template <Source SOURCE, bool BALANCED>
int32_t sparse_saturated(int64_t n, float* __restrict w, const float* __restrict update,
                                const float* __restrict gain, const StepConstants<float>& k, Tally& tally) {
  const auto all = [](float x) { return _mm512_set1_ps(x); };
  const __m512 lr = all(k.lr), kept = all(k.decay_kept), pruned = all(k.decay_pruned);
  const __m512 threshold = all(k.threshold);
  const __m512 scale = all(k.metric_scale), fastest = all(1 / k.metric_scale), snap = all(float(SNAP) * k.metric_scale);
  const __m512 square_c = all(k.imbalance * k.imbalance), one = all(1.0f);
  __m512 sum = all(0.0f), square = all(0.0f);
  const bool has_threshold = k.threshold >= 0;
  const bool guarded = SOURCE == PATTERN || !(k.snap_limit > StepConstants<float>::largest);
  int32_t zeros = 0;
  for_sixteen(n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    __m512 x = lanes.load(w + i), delta = _mm512_mul_ps(lr, lanes.load(update + i));
    __m512 decay = kept;
    __mmask16 may_snap = k.snap_limit < 0 ? 0 : 0xffff;
    if (SOURCE == PATTERN) {
      decay = lanes.load(gain + i);
      may_snap = _mm512_cmp_ps_mask(decay, pruned, _CMP_EQ_OQ);
    } else if (has_threshold) {
      may_snap = _mm512_cmp_ps_mask(size(x), threshold, _CMP_LE_OQ);
      decay = _mm512_mask_mov_ps(kept, may_snap, pruned);
    }
    if (SOURCE == COUPLED) decay = _mm512_mul_ps(decay, lanes.load(gain + i));
    const __m512 old = x, pull = size(delta), twice = _mm512_add_ps(x, x);
    const __m512 drive = _mm512_add_ps(pull, _mm512_add_ps(decay, pull));
    __m512 metric, t;
    if (BALANCED) {
      metric = size(twice);
      t = inverse(_mm512_max_ps(metric, _mm512_max_ps(scale, drive)));
    } else {
      const Roots both = roots(_mm512_fmadd_ps(twice, twice, square_c));
      metric = both.root;
      t = _mm512_min_ps(both.inverse, fastest);
      if (_mm512_cmp_ps_mask(drive, scale, _CMP_GT_OQ)) t = _mm512_min_ps(t, _mm512_div_ps(one, drive));
    }
    delta = _mm512_mul_ps(t, delta);
    const __m512 rho = _mm512_fnmadd_ps(t, decay, one);
    const __m512 factor = _mm512_fmadd_ps(delta, delta, _mm512_mul_ps(rho, rho));
    x = _mm512_fmsub_ps(factor, x, _mm512_mul_ps(_mm512_mul_ps(rho, delta), metric));
    if (guarded) {  // what lives within a budget does not vanish
      const __mmask16 small = _mm512_cmp_ps_mask(size(x), _mm512_min_ps(snap, size(old)), _CMP_LT_OQ);
      x = _mm512_mask_mov_ps(x, small & ~may_snap, old);
    }
    const __mmask16 attracted = may_snap & _mm512_cmp_ps_mask(pull, decay, _CMP_LT_OQ);
    const __m512 far = size(x), limit = _mm512_maskz_mov_ps(attracted, snap);
    const __mmask16 zero = lanes.of(_mm512_cmp_ps_mask(far, limit, _CMP_LE_OQ));
    if (!BALANCED) {
      sum = _mm512_add_ps(sum, far);
      square = _mm512_fmadd_ps(far, far, square);
    }
    zeros += __builtin_popcount(zero);
    lanes.store(w + i, _mm512_mask_mov_ps(x, zero, all(0.0f)));
  });
  tally.add(_mm512_reduce_add_ps(sum), _mm512_reduce_add_ps(square), 0);
  return zeros;
}

int32_t sparse(int64_t n, float* w, const float* update, const float* gain, const StepConstants<float>& k,
               Tally& tally) {
  if (!k.saturated) return sparse<float>(n, w, update, gain, k, tally);
  const Tally before = tally;
  const bool balanced = k.imbalance == 0;
  const Source from = source(k);
  auto loop = from == COUPLED   ? (balanced ? sparse_saturated<COUPLED, true> : sparse_saturated<COUPLED, false>)
              : from == PATTERN ? (balanced ? sparse_saturated<PATTERN, true> : sparse_saturated<PATTERN, false>)
                                : (balanced ? sparse_saturated<UNIFORM, true> : sparse_saturated<UNIFORM, false>);
  const int32_t zeros = loop(n, w, update, gain, k, tally);
  if (!(tally.square - before.square <= StepConstants<float>::largest)) tally = before, add_finite(n, w, tally);
  return zeros;
}

// Four neighbours lie in one 128-bit lane, and rotations bring each of them to the others (scalar: 6 ns per weight).
void nm_decays(int64_t n, const float* w, float* decays, int pattern_n, int pattern_m, float kept, float pruned) {
  if (pattern_m != 4) return nm_decays<float>(n, w, decays, pattern_n, pattern_m, kept, pruned);
  for_sixteen(n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const __m512 mine = size(lanes.load(w + i));
    const __m512i one = _mm512_set1_epi32(1);
    __m512i ahead = _mm512_setzero_si512();
    const auto count = [&](__m512 other, __mmask16 earlier) __attribute__((always_inline)) {
      const __mmask16 ties = earlier & _mm512_cmp_ps_mask(other, mine, _CMP_EQ_OQ);
      ahead = _mm512_mask_add_epi32(ahead, ties | _mm512_cmp_ps_mask(other, mine, _CMP_GT_OQ), ahead, one);
    };
    count(_mm512_permute_ps(mine, 0x39), 0x8888);
    count(_mm512_permute_ps(mine, 0x4e), 0xcccc);
    count(_mm512_permute_ps(mine, 0x93), 0xeeee);
    const __mmask16 is_kept = _mm512_cmplt_epi32_mask(ahead, _mm512_set1_epi32(pattern_n));
    lanes.store(decays + i, _mm512_mask_mov_ps(_mm512_set1_ps(pruned), is_kept, _mm512_set1_ps(kept)));
  });
}

void adam(int64_t n, const float* __restrict g, float* __restrict exp_avg, float* __restrict exp_avg_sq,
          float* __restrict peak, float* __restrict update, float* __restrict gain, const StepConstants<float>& k) {
  const auto all = [](float x) { return _mm512_set1_ps(x); };
  const __m512 share1 = all(k.one_minus_beta1), beta2 = all(k.beta2), share2 = all(k.one_minus_beta2);
  const __m512 correction1 = all(k.bias_correction1), correction2 = all(k.bias_correction2), eps = all(k.eps);
  for_sixteen(n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const __m512 x = lanes.load(g + i), old = lanes.load(exp_avg + i);
    const __m512 m = _mm512_fmadd_ps(share1, _mm512_sub_ps(x, old), old);
    __m512 v = lanes.load(exp_avg_sq + i);
    v = _mm512_fmadd_ps(beta2, v, _mm512_mul_ps(share2, _mm512_mul_ps(x, x)));
    lanes.store(exp_avg + i, m);
    lanes.store(exp_avg_sq + i, v);
    if (peak) {
      const __m512 highest = lanes.load(peak + i);
      v = _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, highest, _CMP_LE_OQ), highest);
      lanes.store(peak + i, v);
    }
    const __m512 p = inverse(_mm512_add_ps(_mm512_sqrt_ps(_mm512_mul_ps(v, correction2)), eps));
    lanes.store(gain + i, p);
    lanes.store(update + i, _mm512_mul_ps(p, _mm512_mul_ps(m, correction1)));
  });
}

}  // namespace
}  // namespace symopt
