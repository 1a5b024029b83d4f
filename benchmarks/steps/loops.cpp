// What the inner loops of the native step cost when memory does not: 512 floats in L1, one thread.  See loops.py.
#include <chrono>
#include <cstdio>

#include "../../kernels/native/native.cpp"

template <class Loop> void time(const char* name, Loop loop) {
  double best = 1e9;
  for (int round = 0; round < 9; round++) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20000; i++) loop();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%-28s %6.2f\n", name, best / 20000 / BLOCK * 16 * 1e9);
}

#define TIME(set, name, ...) time(set " " name, [&] { __VA_ARGS__; })
#define ALL(set, ns)                                                                     \
  TIME(set, "sparse, c > 0", ns::sparse(BLOCK, w, g, p, plastic, tally));                \
  TIME(set, "sparse, c = 0", ns::sparse(BLOCK, w, g, p, balanced, tally));               \
  TIME(set, "adam", ns::adam(BLOCK, g, m, v, static_cast<float*>(nullptr), u, p, plastic)); \
  TIME(set, "sgd momentum", (ns::sgd<float, false, false>(BLOCK, g, m, u, 0.9f, 1.0f)));  \
  TIME(set, "group sums", (ns::add_sums<float, true, false>(BLOCK, g, u, w, sums)));            \
  TIME(set, "group move", ns::move(BLOCK, w, u, 1.0f, 0.0f))

int main() {
  alignas(64) static float w[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK], u[BLOCK], p[BLOCK];
  for (int i = 0; i < BLOCK; i++) w[i] = .01f * (i % 37 - 18) + .001f, m[i] = g[i] = .01f * (i % 13 - 6), v[i] = 1e-4f;
  double sums[4] = {};
  Tally tally;
  Law<double> k{};
  k.lr = 1e-9, k.inside = k.outside = 1e-12, k.threshold = -1, k.metric_scale = .04, k.fresh1 = .1, k.beta2 = 1;
  k.fresh2 = 0, k.unbias1 = k.unbias2 = 1, k.eps = 1e-8, k.saturated = 1, k.direction = SGD, k.imbalance_factor = -1;
  const Law<float> balanced(k);
  k.imbalance = .02;
  const Law<float> plastic(k);
  std::puts("ns per 16 weights");
  ALL("baseline", baseline);
#if defined(__x86_64__)
  if (symopt_instructions() & 1) { ALL("avx2", avx2); }
  if (symopt_instructions() & 2) { ALL("avx512", avx512); }
#endif
}
