// The plain C interface, field by field as library.py has it.  layout.h describes it, so that library.py can refuse a
// library with another interface.

#pragma once

#include <cstdint>

namespace symopt {

enum Direction { SGD, ADAM, ADAMW, LION };
enum Retraction { PLAIN, SPARSE, SPARSE_FREE, GROUP };  // members of planes and units are groups
enum Dtype { FP32, FP64, BF16, FP16 };

// One tensor and its state.
struct Entry {
  void* weight;
  const void* grad;
  void* master;  // fp32 copy of a half-precision weight, or null
  void* first;   // the first moment (momentum's buffer, Adam's mean), or null
  void* second;  // the second moment, or null; one number per group in groups
  void* peak;    // the largest second moment so far, or null
  void* factor_0;  // of a plane with a basis: the basis, in blocks of (columns, BLOCK)
  void* factor_1;
  void* imbalance;
  const void* metric_scale;
  void* step;            // 0-dim counter, or null
  const double* budget;  // strengths kept, pruned, threshold, imbalance factor, largest decay; null: the numbers below
  const int64_t* index;  // group of every weight, or null where the five sizes below describe the groups
  int64_t numel;
  // Element ((band * rows + row) * groups + group) * run + i belongs to group band * groups + group.
  int64_t bands, rows, groups, run;
  double strength_kept, strength_pruned, threshold;  // pruned: up to a size of the threshold; negative: none is
  int64_t zeros;                                     // out: exact zeros after the step
  int32_t retraction, dtype;
  int32_t fresh;                 // momentum's buffer holds nothing yet
  int32_t wide_step;             // the counter is fp64
  int32_t pattern_n, pattern_m;  // the n largest of every m neighbours are kept, whatever the threshold; or 0 and 0
  int32_t decoupled;             // strengths bypass Adam's preconditioner, as AdamW's do
};

// One copy of the orbits of a tile.  With rows: the one in row r and column c is weight at + r * down + c * across.
struct Tile {
  int32_t at, down, across, rows;
};

// Orbits of equally many weights, from second moment `first` on: copy j of orbit i is weight places[j * orbits + i] of
// parameter of[j].  Tile t holds the orbits from begins[t] on, and tiles[j * count + t] may say where without `places`.
// Without any of these, copy j of orbit i is weight i of parameter j.
struct Segment {
  const int32_t *of, *places;
  const int64_t* begins;
  const Tile* tiles;
  int64_t copies, orbits, first, count;
};

// Weights that a plane makes equal, or whose coordinates in a basis, or means over the groups of the one entry, shall
// vanish.  What they have in common (second moments, counter, imbalance, strength) is that of the first parameter.
struct PlaneEntry {
  Entry* const* parameters;
  void* critical;  // running estimate behind an automatic strength, or null
  const Segment* segments;
  int64_t parameter_count, segment_count;
  int64_t columns;           // directions of the basis, or 0
  double sqrt_dim_per_gate;  // what turns AdamW's strength per coordinate into one per gate
  int32_t gate_per_orbit;    // else one gate for all
  int32_t centred;           // means vanish; there are no segments
};

// What one parameter has of units that span several.  Its slices are the groups of its entry, which has one band; slice
// s belongs to unit index[s], or to none (-1).  The unit sees w / factor.
struct UnitsPart {
  const int64_t* index;
  double factor;
};

// Units that span several parameters.  What they have in common is that of the first parameter; second moments are one
// number per unit, then one per weight that belongs to no unit, part by part, in the order of memory.
struct UnitsEntry {
  Entry* const* parameters;
  const UnitsPart* parts;
  const double* sizes;  // weights of every unit
  double* sums;         // (4, count): what the survey finds and the move phase reads
  int64_t parameter_count, count;
};

// What the tensors of a call have in common.
struct Settings {
  double lr, beta1, beta2, eps, momentum, dampening, weight_decay;
  double amplification;     // of a constant gradient by momentum, and so of the strength
  double imbalance_factor;  // negative: the automatic law
  const float* grad_scale;  // or null
  const float* found_inf;   // or null; nonzero skips the step
  int32_t direction, nesterov, maximize, saturated, threads, instructions;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, or null
};

}  // namespace symopt
