// What the inner loops of the native step cost when memory does not: 512 floats in L1, one thread, for the instruction set
// that SYMOPT_SOURCE is.  See loops.py.
#include <chrono>
#include <cstdio>
#include <algorithm>

#include SYMOPT_SOURCE

using namespace symopt;

template <class Loop> void time(const char* name, Loop loop) {
  double best = 1e9;
  for (int round = 0; round < 9; round++) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20000; i++) loop();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%-9s %-16s %6.2f\n", SYMOPT_SET, name, best / 20000 / BLOCK * 16 * 1e9);
}

#define TIME(name, ...) time(name, [&] { __VA_ARGS__; })

int main() {
  alignas(64) static float w[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK], u[BLOCK], p[BLOCK];
  for (int i = 0; i < BLOCK; i++) w[i] = .01f * (i % 37 - 18) + .001f, m[i] = g[i] = .01f * (i % 13 - 6), v[i] = 1e-4f;
  double sums[4] = {};
  Tally tally;
  StepConstants<double> k{};
  k.lr = 1e-9, k.decay_kept = k.decay_pruned = 1e-12, k.threshold = -1, k.metric_scale = .04, k.one_minus_beta1 = .1;
  k.beta2 = 1, k.one_minus_beta2 = 0, k.bias_correction1 = k.bias_correction2 = 1, k.eps = 1e-8, k.saturated = 1;
  k.direction = SGD, k.imbalance_factor = -1;
  const StepConstants<float> balanced(k);
  k.imbalance = .02;
  const StepConstants<float> plastic(k);
  TIME("sparse, c > 0", sparse(BLOCK, w, g, p, plastic, tally));
  TIME("sparse, c = 0", sparse(BLOCK, w, g, p, balanced, tally));
  TIME("adam", adam(BLOCK, g, m, v, static_cast<float*>(nullptr), u, p, plastic));
  TIME("sgd momentum", (sgd<float, false, false>(BLOCK, g, m, u, 0.9f, 1.0f)));
  TIME("lion", lion(BLOCK, g, m, u, plastic));
  TIME("group sums", (add_sums<float, true, false>(BLOCK, g, u, w, sums)));
  TIME("group move", move_group(BLOCK, w, u, 1.0f, 0.0f));
}
