// The plain C interface of binding.py, storage formats, and what the parts of native.cpp share.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr double SNAP = 1e-6, MIN_IMBALANCE_FACTOR = 0.98;
constexpr int64_t BLOCK = 512;            // what a direction hands to a retraction; in L1
constexpr int64_t CHUNK = 1 << 16;        // elements of a task
constexpr int64_t SMALL_CHUNK = 1 << 14;  // the same in tensors below SMALL
constexpr int64_t SMALL = 1 << 20;
constexpr int64_t TILE = 1 << 15;         // elements of a unit that is summed and moved at once; three arrays in L2
constexpr int64_t LONG_RUN = 128;         // members in a row from which a group is summed by itself
constexpr int64_t STRIPE = 4096;          // columns summed side by side, at most
constexpr int64_t NARROW = 256;           // and at least, where a narrower stripe would fit the cache
constexpr int64_t PARTS = 64;             // of a unit that is too large for the cache
constexpr int64_t CHUNKS = 1024;           // of one tensor at most
constexpr int64_t SAMPLE = 1024;           // decays from which the imbalance takes its quantile
constexpr int HISTOGRAM_SHIFT = 16;       // bits of a size that a histogram leaves out
constexpr int64_t SERIAL = 1 << 15;       // below this many elements waking threads costs more than it saves

enum Direction { SGD, ADAM, ADAMW };
enum Retraction { PLAIN, SPARSE, SPARSE_FREE, GROUP, MIRROR };

struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

template <class To, class From> inline To cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(Bfloat h) { return cast<float>(uint32_t(h.bits) << 16); }

inline void narrow(float x, Bfloat& h) {  // to nearest, ties to even
  uint32_t bits = cast<uint32_t>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  h.bits = uint16_t(x != x ? 0x7fc0 : rounded >> 16);
}

inline float widen(Half h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  float x = rest >= 0x7c00 ? cast<float>((rest << 13) + 0x70000000u) : cast<float>(rest << 13) * 0x1p112f;
  return cast<float>(cast<uint32_t>(x) | sign);
}

inline void narrow(float x, Half& h) {
  uint32_t bits = cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff, out;
  if (rest > 0x7f800000) out = 0x7e00;
  else if (rest >= 0x477ff000) out = 0x7c00;  // 65520 and above
  else if (rest < 0x38800000)                 // below 2^-14: adding 1/2 leaves the rounded subnormal in the last bits
    out = cast<uint32_t>(cast<float>(rest) + 0.5f) - cast<uint32_t>(0.5f);
  else out = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  h.bits = uint16_t(sign | out);
}

// 16 bytes of elements of a size, and every second element of two such vectors side by side.
template <size_t> struct Unsigned;
template <> struct Unsigned<2> { using type = uint16_t __attribute__((vector_size(16))); };
template <> struct Unsigned<4> { using type = uint32_t __attribute__((vector_size(16))); };
template <> struct Unsigned<8> { using type = uint64_t __attribute__((vector_size(16))); };
template <size_t N> using Lanes = typename Unsigned<N>::type;

#ifdef __clang__
#define SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif
inline Lanes<2> low(Lanes<2> a, Lanes<2> b) { return SHUFFLE(0, 8, 1, 9, 2, 10, 3, 11); }
inline Lanes<2> high(Lanes<2> a, Lanes<2> b) { return SHUFFLE(4, 12, 5, 13, 6, 14, 7, 15); }
inline Lanes<4> low(Lanes<4> a, Lanes<4> b) { return SHUFFLE(0, 4, 1, 5); }
inline Lanes<4> high(Lanes<4> a, Lanes<4> b) { return SHUFFLE(2, 6, 3, 7); }
inline Lanes<8> low(Lanes<8> a, Lanes<8> b) { return SHUFFLE(0, 2); }
inline Lanes<8> high(Lanes<8> a, Lanes<8> b) { return SHUFFLE(1, 3); }
#undef SHUFFLE

}  // namespace

// One tensor and its state; binding.py mirrors these two structures field by field.
struct Entry {
  void* weight;
  const void* grad;
  void* master;      // fp32 copy of a half-precision weight, or null
  void* first;       // momentum_buffer, exp_avg, or null
  void* second;      // exp_avg_sq, or null; one entry per group in groups
  void* peak;        // max_exp_avg_sq, or null
  void* factor_0;    // of a Mirror with a basis: that, in blocks of (columns, BLOCK)
  void* factor_1;
  void* imbalance;
  const void* metric_scale;
  void* step;              // 0-dim counter, or null
  const double* trim;      // or null: the next three strengths and, in the fourth place, the imbalance's factor
  const int64_t* index;    // group of every weight, or null where the five sizes below describe the groups
  int64_t numel;
  int64_t bands, rows, groups, run;  // element ((band * rows + row) * groups + group) * run + member
  double inside, outside, threshold;  // strengths above and up to a size of the threshold; negative: one for all
  int64_t zeros;           // out: exact zeros after the step
  int32_t retraction, dtype, fresh, wide_step;  // fresh: momentum_buffer is new; wide_step: the counter is fp64
  int32_t keep, of;        // the `keep` largest of every `of` neighbours are inside, whatever the threshold; or 0 and 0
  int32_t decoupled;       // strengths bypass Adam's preconditioner, as AdamW's do
};

// One copy of the orbits of a tile.  With rows: the one in row r and column c is weight at + r * down + c * across.
struct Tile {
  int32_t at, down, across, rows;
};

// Orbits of equally many weights, from second moment `first` on: copy j of orbit i is weight places[j * orbits + i] of
// member of[j].  Tile t holds the orbits from begins[t] on, and tiles[j * count + t] may say where without `places`.
// Without any of these, copy j of orbit i is weight i of member j.
struct Segment {
  const int32_t *of, *places;
  const int64_t* begins;
  const Tile* tiles;
  int64_t copies, orbits, first, count;
};

// Weights that a plane makes equal, or whose coordinates in a basis, or means over the groups of the one entry, shall vanish.
// What they share (second moments, counter, imbalance, strength) is that of the first member.
struct Mirror {
  Entry* const* members;
  void* critical;      // running estimate behind an automatic strength, or null
  const Segment* segments;
  int64_t tensors, count, columns;  // members, segments, directions of the basis or 0
  double spread;       // what turns AdamW's strength per coordinate into one per gate
  int32_t each;        // every orbit has a gate of its own, else there is one for all
  int32_t centred;     // means vanish; there are no segments
};

struct Settings {
  double lr, beta1, beta2, eps, momentum, dampening, weight_decay;
  double imbalance_factor;   // negative: the automatic law
  const float* grad_scale;  // or null
  const float* found_inf;   // or null; nonzero skips the step
  int32_t direction, nesterov, maximize, saturated, threads, instructions;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, or null
};

namespace {

struct Tally {
  double sum = 0, square = 0;  // of the sizes of all units
  int64_t zeros = 0;
  void add(double s, double q, int64_t z) { sum += s, square += q, zeros += z; }
};

// Everything about an entry that its weights share.  Strengths come multiplied by lr.
template <class T> struct Law {
  static constexpr T largest = sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308);
  static constexpr T smallest = sizeof(T) == 4 ? T(1.1754943508222875e-38) : T(2.2250738585072014e-308);
  T lr, inside, outside, threshold, imbalance, metric_scale, momentum, undamped, fresh1, beta2, fresh2, unbias1, unbias2,
      eps, factor, weight_decay, imbalance_factor;
  T snaps;  // up to this size a weight may become zero: the threshold, or infinity without a budget
  int32_t direction, nesterov, saturated, keep, of;

  Law() = default;
  template <class S> explicit Law(const Law<S>& k)
      : lr(T(k.lr)), inside(T(k.inside)), outside(T(k.outside)), threshold(T(k.threshold)), imbalance(T(k.imbalance)),
        metric_scale(T(k.metric_scale)), momentum(T(k.momentum)), undamped(T(k.undamped)), fresh1(T(k.fresh1)),
        beta2(T(k.beta2)), fresh2(T(k.fresh2)), unbias1(T(k.unbias1)), unbias2(T(k.unbias2)), eps(T(k.eps)),
        factor(T(k.factor)), weight_decay(T(k.weight_decay)), imbalance_factor(T(k.imbalance_factor)),
        snaps(T(k.snaps)), direction(k.direction), nesterov(k.nesterov), saturated(k.saturated), keep(k.keep), of(k.of) {}
};

// `rows` rows of `width` elements, `row_stride` apart: `groups` neighbouring groups with runs of `run`; `group` is the
// first of them.
struct Unit {
  int64_t base, row_stride, width, rows, group, groups, run;
};

struct Functions {
  void (*single)(const Entry&, const Law<double>&, int64_t, int64_t, Tally&, double*, int64_t);
  void (*reduce)(const Entry&, const Law<double>&, const Unit&, int64_t, int64_t, double*);
  void (*settle)(const Entry&, const Law<double>&, const Unit&, double*, int64_t, int64_t, void*, void*, Tally&, double*,
                 int64_t);
  void (*apply)(const Entry&, const Law<double>&, const Unit&, int64_t, int64_t, const void*, const void*, Tally&);
};

// What the first sweep adds up, over all weights: `off` is what a weight lacks to the mean of its orbit, x the same of
// the update, d = x times Adam's preconditioner.
struct Survey {
  double ww = 0, uu = 0, uw = 0, dd = 0, dw = 0;  // off^2, x^2, x off, d^2, d off
  double all = 0, paces = 0, most = 0;            // update^2; inverse preconditioners; largest pull of one orbit, squared
  int64_t moving = 0;                             // blocks that the second sweep has to move
  void add(const Survey& s) {
    ww += s.ww, uu += s.uu, uw += s.uw, dd += s.dd, dw += s.dw, all += s.all, paces += s.paces, moving += s.moving;
    most = s.most <= most || most != most ? most : s.most;
  }
};

// One for all: time scale, s^2, and what its own shrink and gradient take from it.
struct Gate {
  double t, square, own;
};

// Blocks of a segment, and where the i-th begins.
inline int64_t blocks_of(const Segment& s) { return s.places ? s.count : (s.orbits + BLOCK - 1) / BLOCK; }
inline int64_t begin_of(const Segment& s, int64_t i) { return s.places ? s.begins[i] : std::min(s.orbits, i * BLOCK); }

struct MirrorFunctions {
  void (*survey)(const Mirror&, const Segment&, const Law<double>&, int64_t, int64_t, Survey&, char*, Tally&, double*,
                 int64_t);
  void (*step)(const Mirror&, const Segment&, const Law<double>&, int64_t, int64_t, const Gate&, const char*, Tally&);
  void (*snap)(const Mirror&, const Segment&, const Law<double>&, int64_t, int64_t);
};

// Of a group, or of a direction of a basis: mean or coordinate of weight and update, and Adam's preconditioner.
struct Mean {
  double off, update, speed;
};

// w' = w - forth u + add, for the weights of a group; or for all weights, and `add` times a direction of the basis.
struct Move {
  double forth, add;
};

inline void add(Survey& all, const Mean& g, double members) {
  const double d = g.speed * g.update;
  all.ww += members * g.off * g.off, all.uu += members * g.update * g.update, all.uw += members * g.update * g.off;
  all.dd += members * d * d, all.dw += members * d * g.off;
}

struct BasisFunctions {
  void (*project)(const Entry&, const Law<double>&, int64_t, int64_t, int64_t, double*);
  void (*lift)(const Entry&, const Law<double>&, int64_t, int64_t, int64_t, const Move*);
  double (*second_moment)(const Entry&, const Law<double>&, int64_t, double);
};

struct CentredFunctions {
  void (*reduce)(const Entry&, const Law<double>&, const Unit&, int64_t, int64_t, double*);
  void (*means)(const Entry&, const Law<double>&, const Unit&, double*, int64_t, int64_t, Mean*, Survey&);
  void (*shift)(const Entry&, const Law<double>&, const Unit&, int64_t, int64_t, const Move*);
};

}  // namespace
