// What native.cpp calls of each instruction set: one table of functions per precision of the step.
//
// survey advances the first moments and adds up what a gate needs; combine turns sums into the numbers of a step; move
// writes the weights.

#pragma once

#include "constants.h"

namespace symopt {

// `rows` rows of `width` elements, `row_stride` apart: `groups` neighbouring groups with runs of `run`; `group` is the
// first of them.
struct Stripe {
  int64_t base, row_stride, width, rows, group, groups, run;
};

// Neighbouring columns of a part, [begin, end), that belong to no unit.  Their second moments in row r begin at
// `second` + r * `stride`.
struct UnboundColumns {
  int64_t begin, end, second, stride;
};

// The sums of a plane's survey over all weights.  off: weight minus mean of its orbit; x: the same of the update; d: x
// times Adam's preconditioner.
struct PlaneSums {
  double ww = 0, uu = 0, uw = 0, dd = 0, dw = 0;  // off^2, x^2, x off, d^2, d off
  double update_sq = 0, sum_inverse = 0;          // of the updates; of the inverse preconditioners
  double largest_pull = 0;                        // of one orbit, squared
  int64_t unmoved = 0;                            // blocks that the survey has left for the move phase
  void add(const PlaneSums& s) {
    ww += s.ww, uu += s.uu, uw += s.uw, dd += s.dd, dw += s.dw;
    update_sq += s.update_sq, sum_inverse += s.sum_inverse, unmoved += s.unmoved;
    largest_pull = s.largest_pull <= largest_pull || largest_pull != largest_pull ? largest_pull : s.largest_pull;
  }
};

// One gate for a whole plane: its time scale, its square, and by how much its own shrink and gradient reduce it.
struct Gate {
  double t, square, own;
};

// Of a group, or of a direction of a basis: mean or coordinate of weight and update, and Adam's preconditioner.
struct Mean {
  double off, update, step_scale;
};

// w' = w - along u + add, for the weights of a group; or for all weights, and `add` times a direction of the basis.
struct MeanMove {
  double along, add;
};

struct Functions {
  using Constants = StepConstants<double>;

  // Single weights [begin, end): direction and retraction at once.
  void (*single)(const Entry&, const Constants&, int64_t begin, int64_t end, Tally&, double* sample, int64_t stride);

  // Groups.  `means`: sums of g^2, u, w, u^2, else of g^2, u^2, u w, w^2.  [begin, end) counts a stripe row by row.
  void (*survey)(const Entry&, const Constants&, const Stripe&, int64_t begin, int64_t end, double* sums, bool means);
  void (*combine)(const Entry&, const Constants&, const Stripe&, double* sums, int64_t parts, int64_t size,
                  const double* counts, void* shrink, void* shift, Tally&, double* sample, int64_t stride);
  void (*move)(const Entry&, const Constants&, const Stripe&, int64_t begin, int64_t end, const void* shrink,
               const void* shift, Tally&);

  // Slices of units: `shrink` and `shift` are those of the units, `unbound` the columns that have none.
  void (*move_slices)(const Entry&, const Constants&, const UnitsPart&, const Stripe&, int64_t begin, int64_t end,
                      const void* shrink, const void* shift, const UnboundColumns* unbound, int64_t unbound_count,
                      Tally&);

  // Orbits of a segment, blocks [begin, end); `moved` has a flag for every block.
  void (*survey_orbits)(const PlaneEntry&, const Segment&, const Constants&, int64_t begin, int64_t end, PlaneSums&,
                        char* moved, Tally&, double* sample, int64_t stride);
  void (*move_orbits)(const PlaneEntry&, const Segment&, const Constants&, int64_t begin, int64_t end, const Gate&,
                      const char* moved, Tally&);
  void (*snap_orbits)(const PlaneEntry&, const Segment&, const Constants&, int64_t begin, int64_t end);

  // Means over groups.
  void (*combine_means)(const Entry&, const Constants&, const Stripe&, double* sums, int64_t parts, int64_t size, Mean*,
                        PlaneSums&);
  void (*move_means)(const Entry&, const Constants&, const Stripe&, int64_t begin, int64_t end, const MeanMove*);

  // Coordinates in a basis: sums of g^2 and u^2, then the coordinates of the weight and of the update.
  void (*survey_basis)(const Entry&, const Constants&, int64_t begin, int64_t end, int64_t columns, double* sums);
  void (*move_basis)(const Entry&, const Constants&, int64_t begin, int64_t end, int64_t columns, const MeanMove*);
  // Advances second moment i, of all weights that have it in common, by the mean of g^2; returns the preconditioner.
  double (*second_moment)(const Entry&, const Constants&, int64_t i, double square);
};

extern const Functions baseline_fp32, baseline_fp64;
#if defined(__x86_64__)
extern const Functions avx2_fp32, avx2_fp64, avx512_fp32;  // fp64 on AVX-512 is AVX2's: rarely used
#endif

// Adds what one group, or one direction, contributes.
inline void add(PlaneSums& all, const Mean& g, double weights) {
  const double d = g.step_scale * g.update;
  all.ww += weights * g.off * g.off, all.uu += weights * g.update * g.update, all.uw += weights * g.update * g.off;
  all.dd += weights * d * d, all.dw += weights * d * g.off;
}

// Blocks of a segment, and where the i-th begins.
inline int64_t block_count(const Segment& s) { return s.places ? s.count : (s.orbits + BLOCK - 1) / BLOCK; }
inline int64_t begin_of(const Segment& s, int64_t i) {
  return s.places ? s.begins[i] : i * BLOCK < s.orbits ? i * BLOCK : s.orbits;
}

}  // namespace symopt
