// Fields, constants and names as text: library.py compares it with its own before it uses a library.

#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

#include "constants.h"

namespace symopt {
namespace {

std::string describe() {
  std::string all;
  char line[128];
  const auto size = [&](const char* name, size_t bytes) {
    std::snprintf(line, sizeof line, "%s %zu\n", name, bytes), all += line;
  };
  const auto field = [&](const char* name, size_t offset, size_t bytes) {
    std::snprintf(line, sizeof line, "  %s %zu %zu\n", name, offset, bytes), all += line;
  };
  const auto number = [&](const char* name, double x) {
    std::snprintf(line, sizeof line, "%s %.17g\n", name, x), all += line;
  };
#define FIELD(name) field(#name, offsetof(Struct, name), sizeof(Struct::name));
  {
    using Struct = Entry;
    size("Entry", sizeof(Struct));
    FIELD(weight) FIELD(grad) FIELD(master) FIELD(first) FIELD(second) FIELD(peak) FIELD(factor_0) FIELD(factor_1)
    FIELD(imbalance) FIELD(metric_scale) FIELD(step) FIELD(budget) FIELD(index) FIELD(numel) FIELD(bands) FIELD(rows)
    FIELD(groups) FIELD(run) FIELD(strength_kept) FIELD(strength_pruned) FIELD(threshold) FIELD(zeros)
    FIELD(retraction) FIELD(dtype) FIELD(fresh) FIELD(wide_step) FIELD(pattern_n) FIELD(pattern_m) FIELD(decoupled)
  }
  {
    using Struct = Segment;
    size("Segment", sizeof(Struct));
    FIELD(of) FIELD(places) FIELD(begins) FIELD(tiles) FIELD(copies) FIELD(orbits) FIELD(first) FIELD(count)
  }
  {
    using Struct = PlaneEntry;
    size("PlaneEntry", sizeof(Struct));
    FIELD(parameters) FIELD(critical) FIELD(segments) FIELD(parameter_count) FIELD(segment_count) FIELD(columns)
    FIELD(sqrt_dim_per_gate) FIELD(gate_per_orbit) FIELD(centred)
  }
  {
    using Struct = UnitsPart;
    size("UnitsPart", sizeof(Struct));
    FIELD(index) FIELD(factor)
  }
  {
    using Struct = UnitsEntry;
    size("UnitsEntry", sizeof(Struct));
    FIELD(parameters) FIELD(parts) FIELD(sizes) FIELD(sums) FIELD(parameter_count) FIELD(count)
  }
  {
    using Struct = Settings;
    size("Settings", sizeof(Struct));
    FIELD(lr) FIELD(beta1) FIELD(beta2) FIELD(eps) FIELD(momentum) FIELD(dampening) FIELD(weight_decay)
    FIELD(amplification) FIELD(imbalance_factor) FIELD(grad_scale) FIELD(found_inf) FIELD(direction)
    FIELD(nesterov) FIELD(maximize) FIELD(saturated) FIELD(threads) FIELD(instructions) FIELD(parallel)
  }
#undef FIELD
#define NUMBER(name) number(#name, double(name));
  NUMBER(SNAP) NUMBER(MIN_IMBALANCE_FACTOR) NUMBER(SAMPLE) NUMBER(AUTO_STRENGTH_MARGIN) NUMBER(CRITICAL_EMA)
  NUMBER(CRITICAL_FLOOR) NUMBER(BLOCK) NUMBER(HISTOGRAM_SHIFT)
  NUMBER(SGD) NUMBER(ADAM) NUMBER(ADAMW) NUMBER(LION)
  NUMBER(PLAIN) NUMBER(SPARSE) NUMBER(SPARSE_FREE) NUMBER(GROUP)
  NUMBER(FP32) NUMBER(FP64) NUMBER(BF16) NUMBER(FP16)
#undef NUMBER
  return all;
}

}  // namespace
}  // namespace symopt
