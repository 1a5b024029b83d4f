// The constrained step on CPUs: how tensors are cut into tasks, and who runs them.
//
// elementwise.h and group.h hold the arithmetic and are compiled here once per instruction set; the best one
// that the processor has is chosen when the step runs.  There is no thread pool: tasks run on the OpenMP runtime torch
// itself has loaded, whose entry point the caller passes in.  A second pool would spin against it.

#include "types.h"

#include <thread>

namespace {

#define SYMOPT_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define SYMOPT_TARGET(list) SYMOPT_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define SYMOPT_TARGET_END SYMOPT_PRAGMA(clang attribute pop)
#define SYMOPT_WIDE ""
#else
#define SYMOPT_TARGET(list) SYMOPT_PRAGMA(GCC push_options) SYMOPT_PRAGMA(GCC target(list))
#define SYMOPT_TARGET_END SYMOPT_PRAGMA(GCC pop_options)
#define SYMOPT_WIDE ",prefer-vector-width=512"
#endif

namespace baseline {
#include "elementwise.h"
#include "group.h"
#include "orbit_copies.h"
#include "orbit.h"
#include "centred.h"
#include "basis.h"
}  // namespace baseline
#if defined(__x86_64__)
#define SYMOPT_F16C
SYMOPT_TARGET("avx2,fma,f16c")
namespace avx2 {
#include "elementwise.h"
#include "group.h"
#include "orbit_copies.h"
#include "orbit.h"
#include "centred.h"
#include "basis.h"
}  // namespace avx2
SYMOPT_TARGET_END
SYMOPT_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" SYMOPT_WIDE)
namespace avx512 {
#include "elementwise.h"
#include "avx512.h"
#include "group.h"
#include "orbit_copies.h"
#include "orbit.h"
#include "centred.h"
#include "basis.h"
}  // namespace avx512
SYMOPT_TARGET_END
#endif

// The functions of one instruction set and number format.
#define SYMOPT_CHOOSE(table, instructions) (SYMOPT_BETTER(table, instructions) baseline::table)
#if defined(__x86_64__)
#define SYMOPT_BETTER(table, instructions) (instructions) == 2 ? avx512::table : (instructions) == 1 ? avx2::table :
#else
#define SYMOPT_BETTER(table, instructions)
#endif

// -------------------------------------------------------------------------------------------------------------- tasks

// How one entry is cut, and what its tasks share.
struct Work {
  Entry* e = nullptr;
  Law<double> k;
  const Functions* f = nullptr;
  bool grouped = false;
  int64_t units = 0, unit_groups = 0, width = 0, numbers = 0, parts = 1, part = 0, per_task = 1, tasks = 0;
  int64_t first_task = 0;
  int64_t sums_size = 0, stride = 1, samples = 0;
  std::unique_ptr<Tally[]> tallies;
  std::unique_ptr<double[]> sums, sample;
  std::unique_ptr<char[]> keep, shift;
  bool split = false;                               // units are summed in parts, then moved in parts
  std::unique_ptr<std::atomic<int64_t>[]> waiting;  // parts of every unit that still sum; -1 once it may move
  std::atomic<int64_t> left{0};                     // tasks that still write weights

  Unit unit(int64_t i) const {
    if (e->index) return {0, e->numel, e->numel, 1, 0, e->groups, 1};
    int64_t per_band = (e->groups + unit_groups - 1) / unit_groups, band = i / per_band;
    int64_t group = i % per_band * unit_groups, n = std::min(unit_groups, e->groups - group);
    int64_t stride = e->groups * e->run;
    return {band * e->rows * stride + group * e->run, stride, n * e->run, e->rows, band * e->groups + group, n, e->run};
  }

  // Where a part of a unit lies.  The last stripe of a band may be narrower; it has as many rows there as elsewhere.
  void bounds(const Unit& unit, int64_t i, int64_t& begin, int64_t& end) const {
    const int64_t size = unit.rows * unit.width, length = unit_groups > 1 ? part / width * unit.width : part;
    begin = std::min(size, i * length), end = std::min(size, begin + length);
  }
};

template <class T> double read(const void* p) { return double(*static_cast<const T*>(p)); }

// A number of the state, in the precision in which the entry is stepped.
double read(const Entry& e, const void* p) { return e.dtype == 1 ? read<double>(p) : read<float>(p); }

void write(const Entry& e, void* p, double x) {
  if (e.dtype == 1) *static_cast<double*>(p) = x;
  else *static_cast<float*>(p) = float(x);
}

void cut(Work& w) {
  Entry& e = *w.e;
  w.grouped = e.retraction == GROUP || e.retraction == MIRROR;
  if (!w.grouped) {
    int64_t chunk = e.numel < SMALL ? SMALL_CHUNK : std::max(CHUNK, (e.numel / CHUNKS + BLOCK) / BLOCK * BLOCK);
    w.part = e.of ? chunk / e.of * e.of : chunk;
    w.tasks = std::max<int64_t>(1, (e.numel + w.part - 1) / w.part);
  } else if (e.index) {
    w.units = 1;
    w.parts = std::max<int64_t>(1, std::min<int64_t>(16, e.numel / std::max(CHUNK, 64 * e.groups)));
    w.part = (e.numel + w.parts - 1) / w.parts;
    w.sums_size = 5 * e.groups;
    w.numbers = e.groups;
    w.tasks = w.parts;
  } else {
    // Stripes as narrow as it takes to fit the cache, unless that would leave too little of every row.
    int64_t width = TILE / e.rows < NARROW ? STRIPE : std::min(STRIPE, TILE / e.rows);
    w.unit_groups = e.run >= LONG_RUN ? 1 : std::min(e.groups, std::max<int64_t>(1, width / e.run));
    w.width = w.unit_groups * e.run;
    w.units = e.bands * ((e.groups + w.unit_groups - 1) / w.unit_groups);
    w.numbers = w.unit_groups == 1 ? 1 : w.width;
    w.sums_size = 4 * w.numbers;
    int64_t size = e.rows * w.width;
    if (size > TILE) {
      // Partial sums of a stripe take 32 bytes a column, and one thread adds them up: at least 256 rows to a part.
      int64_t most = w.unit_groups == 1 ? PARTS : std::max<int64_t>(2, std::min(PARTS, e.rows / 256));
      w.parts = std::min((size + TILE - 1) / TILE, most);
      w.part = (size + w.parts - 1) / w.parts;
      int64_t whole = w.unit_groups == 1 ? BLOCK : w.width;
      w.part = (w.part + whole - 1) / whole * whole;
      w.parts = (size + w.part - 1) / w.part;
    }
    // Neighbouring units on one core: its prefetcher then runs ahead of the sums (16M weights, SGD: 5.3 -> 4.4 ms).
    if (w.parts == 1)
      w.per_task = std::max<int64_t>(1, std::clamp(e.numel / PARTS, SMALL_CHUNK, 4 * CHUNK) / size);
    w.tasks = w.parts == 1 ? (w.units + w.per_task - 1) / w.per_task : w.units * w.parts;
  }
  w.split = e.index || w.parts > 1;
  if (w.split) {
    w.sums.reset(new double[w.tasks * w.sums_size]);
    w.keep.reset(new char[w.units * w.numbers * sizeof(double)]);
    w.shift.reset(new char[w.units * w.numbers * sizeof(double)]);
    w.waiting.reset(new std::atomic<int64_t>[w.units]);
    for (int64_t i = 0; i < w.units; i++) w.waiting[i] = w.parts;
  }
  w.left = w.tasks;
  w.tallies.reset(new Tally[w.tasks]);
}

Law<double> law(const Entry& e, const Settings& s) {
  Law<double> k;
  bool constrained = e.retraction != PLAIN;
  double step = 0;
  if (e.step) {
    step = (e.wide_step ? read<double>(e.step) : read<float>(e.step)) + 1;
    if (e.wide_step) *static_cast<double*>(e.step) = step;
    else *static_cast<float*>(e.step) = float(step);
  }
  k.direction = s.direction == ADAM && e.decoupled ? ADAMW : s.direction;
  k.nesterov = s.nesterov, k.saturated = s.saturated;
  k.lr = s.lr, k.momentum = s.momentum, k.undamped = 1 - s.dampening;
  k.fresh1 = 1 - s.beta1, k.beta2 = s.beta2, k.fresh2 = 1 - s.beta2, k.eps = s.eps;
  k.unbias1 = e.step ? 1 / (1 - std::pow(s.beta1, step)) : 1;
  k.unbias2 = e.step ? 1 / (1 - std::pow(s.beta2, step)) : 1;
  k.factor = (s.maximize ? -1.0 : 1.0) / (s.grad_scale ? double(*s.grad_scale) : 1.0);
  k.weight_decay = constrained || s.direction == ADAMW ? 0 : s.weight_decay;
  double amplify = s.direction == SGD && e.first ? (1 - s.dampening) / (1 - s.momentum) : 1;
  const double given[4] = {e.inside, e.outside, e.threshold, s.imbalance_factor}, *trim = e.trim ? e.trim : given;
  const bool pattern = e.of && trim[2] >= 0;
  k.keep = pattern ? e.keep : 0, k.of = pattern ? e.of : 0;
  k.inside = constrained ? s.lr * trim[0] * amplify : s.direction == ADAMW ? s.lr * s.weight_decay : 0;
  k.outside = s.lr * trim[1] * amplify;
  k.threshold = trim[2], k.snaps = trim[2] < 0 && !e.trim ? HUGE_VAL : trim[2];
  k.imbalance_factor = trim[3];
  k.imbalance = e.imbalance ? read(e, e.imbalance) : 0;
  k.metric_scale = e.metric_scale ? read(e, e.metric_scale) : 1;
  return k;
}

// reference.py's imbalance_law, or the factor given for this step.  `sample` holds some decays, or nothing where all are
// `k.inside`; `all` the sizes of the units.
void decay_imbalance(const Entry& e, const Law<double>& k, double* sample, int64_t samples, const Tally& all) {
  double c = k.imbalance, keep = k.imbalance_factor;
  if (keep < 0) {
    double decay = k.inside;
    if (sample) {
      for (int64_t i = 0; i < samples; i++)
        if (sample[i] != sample[i]) sample[i] = HUGE_VAL;  // as kthvalue: NaN comes last
      double* low = sample + samples / 10;
      std::nth_element(sample, low, sample + samples);
      decay = *low;
    }
    if (k.saturated) {
      double typical = 2 * all.square / std::max(all.sum, Law<double>::smallest);
      decay /= std::max(k.metric_scale, typical);
    }
    double rho = std::max(1 - decay, 0.0);
    keep = std::max(rho * rho * rho * rho, MIN_IMBALANCE_FACTOR);
  }
  c *= keep;
  if (c <= SNAP * k.metric_scale) c = 0;
  write(e, e.imbalance, c);
}

void finish(Work& w) {
  Tally all;
  for (int64_t i = 0; i < w.tasks; i++) all.add(w.tallies[i].sum, w.tallies[i].square, w.tallies[i].zeros);
  w.e->zeros = all.zeros;
  if (!w.e->imbalance || w.e->retraction == SPARSE_FREE || w.e->retraction == PLAIN) return;
  decay_imbalance(*w.e, w.k, w.sample.get(), w.samples, all);
}

struct Job {
  std::vector<Work>* works;
  const Settings* settings;
  std::atomic<int64_t> next;
  int64_t tasks;
};

inline void breathe() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Units are moved one unit after they are summed, while their memory may still be in the last-level cache:
// sum 0, sum 1, move 0, sum 2, move 1, ...  Tasks are taken in this order, so whoever waits for a unit waits for
// tasks that others are already running.
void run_part(Work& w, int64_t i, const Settings& s) {
  const Entry& e = *w.e;
  const int64_t turn = i / w.parts, part = i % w.parts, wide = e.dtype == 1 ? sizeof(double) : sizeof(float);
  const bool moving = turn == 2 * w.units - 1 || (turn > 0 && turn % 2 == 0);
  const int64_t j = turn == 2 * w.units - 1 ? w.units - 1 : moving ? turn / 2 - 1 : (turn + 1) / 2;
  const Unit unit = w.unit(j);
  int64_t begin, end;
  w.bounds(unit, part, begin, end);
  double* sums = w.sums.get() + j * w.parts * w.sums_size;
  char *keep = w.keep.get() + j * w.numbers * wide, *shift = w.shift.get() + j * w.numbers * wide;
  std::atomic<int64_t>& waiting = w.waiting[static_cast<size_t>(j)];
  if (moving) {
    for (int spins = 0; waiting.load(std::memory_order_acquire) >= 0; spins++)
      if (spins < 1000) breathe();
      else std::this_thread::yield();  // more threads than cores: whoever is summing may need this one
    w.f->apply(e, w.k, unit, begin, end, keep, shift, w.tallies[static_cast<size_t>(j * w.parts + part)]);
    if (--w.left == 0) finish(w);
    return;
  }
  double* own = sums + part * w.sums_size;
  std::fill(own, own + w.sums_size, 0.0);
  w.f->reduce(e, w.k, unit, begin, end, own);
  if (--waiting == 0) {
    Tally& tally = w.tallies[static_cast<size_t>(j * w.parts)];
    w.f->settle(e, w.k, unit, sums, w.parts, w.sums_size, keep, shift, tally, w.sample.get(), w.stride);
    waiting.store(-1, std::memory_order_release);
  }
}

void run_task(Job& job, int64_t task) {
  auto after = std::upper_bound(job.works->begin(), job.works->end(), task,
                                [](int64_t t, const Work& w) { return t < w.first_task; });
  Work& w = *(after - 1);
  const Entry& e = *w.e;
  const int64_t i = task - w.first_task;
  if (w.split) return run_part(w, i, *job.settings);
  Tally& tally = w.tallies[static_cast<size_t>(i)];
  if (!w.grouped) {
    w.f->single(e, w.k, i * w.part, std::min(e.numel, (i + 1) * w.part), tally, w.sample.get(), w.stride);
  } else {
    double sums[4 * STRIPE], keep[STRIPE], shift[STRIPE];
    for (int64_t j = i * w.per_task; j < std::min(w.units, (i + 1) * w.per_task); j++) {
      const Unit unit = w.unit(j);
      std::fill(sums, sums + w.sums_size, 0.0);
      w.f->reduce(e, w.k, unit, 0, unit.rows * unit.width, sums);
      w.f->settle(e, w.k, unit, sums, 1, w.sums_size, keep, shift, tally, w.sample.get(), w.stride);
      w.f->apply(e, w.k, unit, 0, unit.rows * unit.width, keep, shift, tally);
    }
  }
  if (--w.left == 0) finish(w);
}

void worker(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (int64_t task; (task = job.next++) < job.tasks;) run_task(job, task);
}

void run(std::vector<Work>& works, const Settings& s, int64_t tasks, int64_t elements) {
  Job job{&works, &s, {0}, tasks};
  unsigned threads = unsigned(std::min<int64_t>(s.threads, tasks));
  if (s.parallel && threads > 1 && elements > SERIAL) s.parallel(worker, &job, threads, 0);
  else worker(&job);
}

#include "orbit_tasks.h"
#include "centred_tasks.h"
#include "basis_tasks.h"

}  // namespace

#define SYMOPT_PUBLIC __attribute__((visibility("default")))

extern "C" {

// Bits: 1 avx2, 2 avx512; what this processor has beside the baseline.
SYMOPT_PUBLIC int symopt_instructions() {
#if defined(__x86_64__)
  int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // no processor has avx2 without f16c
  int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 + 2 * avx512;
#else
  return 0;
#endif
}

SYMOPT_PUBLIC int symopt_sizes() { return int((sizeof(Entry) * 1000 + sizeof(Settings)) * 1000 + sizeof(Mirror)); }

// Steps `count` tensors.  Returns 0, or 1 if memory ran out before anything was changed.
SYMOPT_PUBLIC int symopt_step(Entry* const* entries, int64_t count, const Settings* settings) try {
  const Settings& s = *settings;
  if (s.found_inf && *s.found_inf != 0) return 0;
  std::vector<Work> works(static_cast<size_t>(count));
  int64_t tasks = 0, elements = 0;
  for (int64_t i = 0; i < count; i++) {
    Work& w = works[static_cast<size_t>(i)];
    w.e = entries[i];
    w.f = SYMOPT_CHOOSE(table, s.instructions)[w.e->dtype];
    cut(w);
    w.first_task = tasks;
    tasks += w.split ? 2 * w.tasks : w.tasks;
    elements += w.e->numel;
    bool trimmed = w.e->threshold >= 0 && w.e->inside != w.e->outside;
    if (w.e->imbalance && w.e->retraction != PLAIN && s.imbalance_factor < 0 && !w.e->trim &&
        (s.direction == ADAM || trimmed || (w.grouped && s.direction == ADAMW))) {
      int64_t n = w.grouped ? (w.e->index ? w.e->groups : w.e->bands * w.e->groups) : w.e->numel;
      w.stride = std::max<int64_t>(1, n / SAMPLE);
      w.samples = (n + w.stride - 1) / w.stride;
      w.sample.reset(new double[static_cast<size_t>(w.samples)]);
    }
  }
  for (Work& w : works) w.k = law(*w.e, s);
  run(works, s, tasks, elements);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// The same for weights under fixed planes.
SYMOPT_PUBLIC int symopt_step_mirror(const Mirror* const* mirrors, int64_t count, const Settings* settings) try {
  if (settings->found_inf && *settings->found_inf != 0) return 0;
  std::vector<std::unique_ptr<PlaneWork>> works;
  for (const Mirror* const* at = mirrors; at != mirrors + count; at++)
    if ((*at)->centred) works.emplace_back(new CentredWork(*at));
    else if ((*at)->columns) works.emplace_back(new BasisWork(*at));
    else works.emplace_back(new MirrorWork(*at));
  for (auto& w : works) step_mirror(*w, *settings);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// How many elements of an fp32 tensor have a size with these upper bits, which order floats as the sizes do; NaN last.
SYMOPT_PUBLIC void symopt_histogram(const float* x, int64_t numel, int64_t* counts) {
  int64_t zeros = 0;  // apart, or in a sparse tensor every element would wait for the count of the one before
  for (int64_t i = 0; i < numel; i++) {
    const uint32_t key = cast<uint32_t>(x[i]) & 0x7fffffff;
    if (key)
      counts[key >> HISTOGRAM_SHIFT]++;
    else
      zeros++;
  }
  counts[0] += zeros;
}

// The k-th smallest size of an fp32 tensor (k from 1), exactly, given its histogram; negative without memory.
SYMOPT_PUBLIC float symopt_rank(const float* x, int64_t numel, const int64_t* counts, int64_t k) try {
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
} catch (const std::bad_alloc&) {
  return -1;
}

// How many weights of each tensor live, from their histograms: selection.py's `_shares`.  Bins that score
// less than 1 / far are only ranked.  Returns 1 without memory.
SYMOPT_PUBLIC int symopt_shares(const int64_t* const* counts, int64_t tensors, int64_t keep, double far, double rounding,
                                int64_t* live) try {
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
      const double largest = Law<float>::largest, middle = size <= largest ? size : largest, square = middle * middle;
      const double before = above / square;
      above += n * square;
      order.push_back(before), first.push_back(std::min(before, far)), near.push_back(before < far ? n : 0);
      many.push_back(n), owner.push_back(t);
      most = std::max(most, first.back() + near.back());
    }
  }
  const size_t bins = first.size();
  for (int i = 0; i < 64 && least < most; i++) {  // so many scores as `keep` are above 1 / cut
    const double cut = least + (most - least) / 2;
    double sum = 0;
    for (size_t j = 0; j < bins; j++) sum += std::min(std::max(cut - first[j], 0.0), near[j]);
    (sum < double(keep) ? least : most) = cut;
  }
  std::vector<size_t> rest;
  for (size_t j = 0; j < bins; j++) {
    double n = std::floor(most - first[j] - rounding);
    n = std::min(std::max(n, first[j] == 0 ? 1.0 : 0.0), near[j]);
    live[owner[j]] += int64_t(n), keep -= int64_t(n), many[j] -= n;
    if (many[j] > 0) rest.push_back(j);
  }
  // What rounding down has left goes to the best of the rest.
  const auto worse = [&](size_t a, size_t b) { return order[a] > order[b] || (order[a] == order[b] && a > b); };
  std::make_heap(rest.begin(), rest.end(), worse);
  while (keep > 0 && !rest.empty()) {
    std::pop_heap(rest.begin(), rest.end(), worse);
    const int64_t more = std::min(keep, int64_t(many[rest.back()]));
    live[owner[rest.back()]] += more, keep -= more;
    rest.pop_back();
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
