// How work is divided into tasks, and who runs them.
//
// There is no thread pool: tasks run on the OpenMP runtime torch itself has loaded, whose entry point the caller passes
// in.  The threads of a second pool would compete with its own.  What a task covers depends on the shape alone, and
// sums of tasks are added in their order, so results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "functions.h"

namespace symopt {
namespace {

constexpr int64_t CHUNK = 1 << 16;        // elements of a task
constexpr int64_t SMALL_CHUNK = 1 << 14;  // the same in tensors below SMALL_TENSOR
constexpr int64_t SMALL_TENSOR = 1 << 20;
constexpr int64_t CHUNKS = 1024;          // of one tensor, at most
constexpr int64_t CACHED = 1 << 15;       // elements of a stripe that is summed and moved at once; three arrays in L2
constexpr int64_t LONG_RUN = 128;         // members in a row from which a group is summed by itself
constexpr int64_t MIN_STRIPE = 256;       // columns summed side by side, where a narrower stripe would fit the cache
constexpr int64_t PARTS = 64;             // of a stripe that is too large for the cache
constexpr int64_t SERIAL = 1 << 15;       // below this many elements waking threads costs more than it saves

const Functions& functions_of(const Settings& s, const Entry& e) {
  const bool wide = e.dtype == FP64;
#if defined(__x86_64__)
  if (s.instructions == 2) return wide ? avx2_fp64 : avx512_fp32;
  if (s.instructions == 1) return wide ? avx2_fp64 : avx2_fp32;
#endif
  return wide ? baseline_fp64 : baseline_fp32;
}

template <class F> struct Sweep {
  const F& f;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  static void worker(void* argument) {
    Sweep& sweep = *static_cast<Sweep*>(argument);
    for (int64_t task; (task = sweep.next++) < sweep.tasks;) sweep.f(task);
  }
};

// f(i) for every i below `tasks`, taken in this order.
template <class F> void sweep(int64_t tasks, int64_t elements, const Settings& s, const F& f) {
  Sweep<F> all{f, tasks};
  const unsigned threads = unsigned(std::min<int64_t>(s.threads, tasks));
  if (s.parallel && threads > 1 && elements > SERIAL) s.parallel(all.worker, &all, threads, 0);
  else all.worker(&all);
}

// Elements of one task of a tensor that is divided without regard to groups.
inline int64_t chunk_of(int64_t numel) {
  return numel < SMALL_TENSOR ? SMALL_CHUNK : std::max(CHUNK, (numel / CHUNKS + BLOCK) / BLOCK * BLOCK);
}

// The tensor to which a task belongs, of several whose first tasks are in order.
template <class W> W& owner_of(std::vector<W>& works, int64_t task) {
  auto after = std::upper_bound(works.begin(), works.end(), task,
                                [](int64_t t, const W& w) { return t < w.first_task; });
  return *(after - 1);
}

// Groups as stripes: one group whose members form long runs, or neighbouring groups with short ones.  A stripe that
// fits the cache is a task, alone or with its neighbours; a larger one is divided into parts.
struct Stripes {
  const Entry* e = nullptr;
  int64_t count = 0, groups = 0, width = 0;  // stripes, and groups and columns of each but the last of a band
  int64_t parts = 1, part = 0;               // of a stripe, and elements of a part
  int64_t per_task = 1, tasks = 0;           // stripes of a task, where they are not divided
  int64_t numbers = 0;                       // columns that have sums and results
  bool divided = false;

  void partition(const Entry& entry) {
    e = &entry;
    if (e->index) {
      count = 1;
      parts = std::max<int64_t>(1, std::min<int64_t>(16, e->numel / std::max(CHUNK, 64 * e->groups)));
      part = (e->numel + parts - 1) / parts;
      numbers = e->groups, tasks = parts, divided = true;
      return;
    }
    // Stripes narrow enough to fit the cache, unless too little of every row were left.
    const int64_t fitting = CACHED / e->rows < MIN_STRIPE ? MAX_STRIPE : std::min(MAX_STRIPE, CACHED / e->rows);
    groups = e->run >= LONG_RUN ? 1 : std::min(e->groups, std::max<int64_t>(1, fitting / e->run));
    width = groups * e->run;
    count = e->bands * ((e->groups + groups - 1) / groups);
    numbers = groups == 1 ? 1 : width;
    const int64_t size = e->rows * width;
    if (size > CACHED) {
      // Partial sums of a stripe take 32 bytes a column, and one thread adds them up: at least 256 rows to a part.
      const int64_t most = groups == 1 ? PARTS : std::max<int64_t>(2, std::min(PARTS, e->rows / 256));
      parts = std::min((size + CACHED - 1) / CACHED, most);
      part = (size + parts - 1) / parts;
      const int64_t whole = groups == 1 ? BLOCK : width;
      part = (part + whole - 1) / whole * whole;
      parts = (size + part - 1) / part;
    }
    // Neighbouring stripes on one core: its prefetcher then runs ahead of the sums (16M weights, SGD: 5.3 -> 4.4 ms).
    if (parts == 1) per_task = std::max<int64_t>(1, std::clamp(e->numel / PARTS, SMALL_CHUNK, 4 * CHUNK) / size);
    tasks = parts == 1 ? (count + per_task - 1) / per_task : count * parts;
    divided = parts > 1;
  }

  int64_t sums_size() const { return (e->index ? 5 : 4) * numbers; }

  Stripe stripe(int64_t i) const {
    if (e->index) return {0, e->numel, e->numel, 1, 0, e->groups, 1};
    const int64_t per_band = (e->groups + groups - 1) / groups, band = i / per_band;
    const int64_t group = i % per_band * groups, n = std::min(groups, e->groups - group);
    const int64_t stride = e->groups * e->run, base = band * e->rows * stride + group * e->run;
    return {base, stride, n * e->run, e->rows, band * e->groups + group, n, e->run};
  }

  // Where a part of a stripe lies.  The last stripe of a band may be narrower; it has as many rows there as elsewhere.
  void bounds(const Stripe& stripe, int64_t i, int64_t& begin, int64_t& end) const {
    const int64_t size = stripe.rows * stripe.width, length = groups > 1 ? part / width * stripe.width : part;
    begin = std::min(size, i * length), end = std::min(size, begin + length);
  }

  // f(i, stripe, begin, end) for the stripes of a task, or for the part of one.
  template <class F> void visit(int64_t task, const F& f) const {
    if (divided) {
      const Stripe one = stripe(task / parts);
      int64_t begin, end;
      bounds(one, task % parts, begin, end);
      return f(task / parts, one, begin, end);
    }
    for (int64_t i = task * per_task; i < std::min(count, (task + 1) * per_task); i++) {
      const Stripe one = stripe(i);
      f(i, one, 0, one.rows * one.width);
    }
  }
};

}  // namespace
}  // namespace symopt
