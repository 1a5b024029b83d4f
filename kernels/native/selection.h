// Which weights a budget lets live: order statistics of sizes, from histograms of their upper bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "constants.h"
#include "formats.h"

namespace symopt {
namespace {

// How many elements of an fp32 tensor have a size with these upper bits, which order floats as the sizes do; NaN last.
void histogram(const float* x, int64_t numel, int64_t* counts) {
  int64_t zeros = 0;  // counted apart: else in a sparse tensor every increment waits for the one before
  for (int64_t i = 0; i < numel; i++) {
    const uint32_t key = cast<uint32_t>(x[i]) & 0x7fffffff;
    if (key)
      counts[key >> HISTOGRAM_SHIFT]++;
    else
      zeros++;
  }
  counts[0] += zeros;
}

// The k-th smallest size of an fp32 tensor (k from 1), exactly, given its histogram.
float rank(const float* x, int64_t numel, const int64_t* counts, int64_t k) {
  uint32_t bin = 0;
  for (; counts[bin] < k; bin++) k -= counts[bin];
  std::vector<uint32_t> keys;
  keys.reserve(counts[bin]);
  for (int64_t i = 0; i < numel; i++) {
    const uint32_t key = cast<uint32_t>(x[i]) & 0x7fffffff;
    if (key >> HISTOGRAM_SHIFT == bin) keys.push_back(key);
  }
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end());
  return cast<float>(keys[k - 1]);
}

// How many weights of each tensor live within a budget of all, from their histograms.  Bins that score less than 1 /
// far are only ranked.
void shares(const int64_t* const* counts, int64_t tensors, int64_t budget, double far, double rounding, int64_t* live) {
  std::vector<double> order, first, near, many;
  std::vector<int64_t> owner;
  double least = 0, most = 0;
  for (int64_t t = 0; t < tensors; t++) {
    live[t] = 0;
    double above = 0;
    for (int64_t bin = (int64_t(1) << (31 - HISTOGRAM_SHIFT)) - 1; bin >= 0; bin--) {
      const double n = double(counts[t][bin]);
      if (n == 0) continue;
      const double size = cast<float>(uint32_t(bin) << HISTOGRAM_SHIFT | 1u << (HISTOGRAM_SHIFT - 1));
      const double largest = StepConstants<float>::largest, middle = size <= largest ? size : largest;
      const double square = middle * middle;
      const double before = above / square;
      above += n * square;
      order.push_back(before), first.push_back(std::min(before, far)), near.push_back(before < far ? n : 0);
      many.push_back(n), owner.push_back(t);
      most = std::max(most, first.back() + near.back());
    }
  }
  const size_t bins = first.size();
  for (int i = 0; i < 64 && least < most; i++) {  // until as many scores as the budget allows exceed 1 / limit
    const double limit = least + (most - least) / 2;
    double sum = 0;
    for (size_t j = 0; j < bins; j++) sum += std::min(std::max(limit - first[j], 0.0), near[j]);
    (sum < double(budget) ? least : most) = limit;
  }
  std::vector<size_t> rest;
  for (size_t j = 0; j < bins; j++) {
    double n = std::floor(most - first[j] - rounding);
    n = std::min(std::max(n, first[j] == 0 ? 1.0 : 0.0), near[j]);
    live[owner[j]] += int64_t(n), budget -= int64_t(n), many[j] -= n;
    if (many[j] > 0) rest.push_back(j);
  }
  // The remainder of rounding down goes to the best of the rest.
  const auto worse = [&](size_t a, size_t b) { return order[a] > order[b] || (order[a] == order[b] && a > b); };
  std::make_heap(rest.begin(), rest.end(), worse);
  while (budget > 0 && !rest.empty()) {
    std::pop_heap(rest.begin(), rest.end(), worse);
    const int64_t more = std::min(budget, int64_t(many[rest.back()]));
    live[owner[rest.back()]] += more, budget -= more;
    rest.pop_back();
  }
}

}  // namespace
}  // namespace symopt
