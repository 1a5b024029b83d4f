// The step of tensors one by one: single weights, and groups within a tensor.
//
// A stripe of groups that fits the cache is surveyed, combined and moved at once, so that memory is read once; a larger
// one is surveyed in parts, then moved in parts.

#pragma once

#include <thread>

#include "imbalance.h"
#include "tasks.h"

namespace symopt {
namespace {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct TensorWork {
  Entry* e = nullptr;
  StepConstants<double> k;
  const Functions* f = nullptr;
  bool grouped = false;
  int64_t first_task = 0, tasks = 0, chunk = 0;
  int64_t stride = 1, samples = 0;
  Stripes stripes;
  std::unique_ptr<Tally[]> tallies;
  std::unique_ptr<double[]> sums, sample;
  std::unique_ptr<char[]> shrink, shift;
  std::unique_ptr<std::atomic<int64_t>[]> surveying;  // parts of every stripe not yet surveyed; -1 once it may move
  std::atomic<int64_t> remaining{0};                  // tasks that still write weights

  void partition(Entry& entry, const Settings& s) {
    e = &entry, f = &functions_of(s, entry);
    grouped = e->retraction == GROUP;
    if (grouped) {
      stripes.partition(entry);
      remaining = stripes.tasks;
      if (stripes.divided) {
        sums.reset(new double[static_cast<size_t>(stripes.tasks * stripes.sums_size())]);
        shrink.reset(new char[static_cast<size_t>(stripes.count * stripes.numbers) * sizeof(double)]);
        shift.reset(new char[static_cast<size_t>(stripes.count * stripes.numbers) * sizeof(double)]);
        surveying.reset(new std::atomic<int64_t>[static_cast<size_t>(stripes.count)]);
        for (int64_t i = 0; i < stripes.count; i++) surveying[static_cast<size_t>(i)] = stripes.parts;
      }
    } else {
      const int64_t size = chunk_of(e->numel);
      chunk = e->pattern_m ? size / e->pattern_m * e->pattern_m : size;
      remaining = std::max<int64_t>(1, (e->numel + chunk - 1) / chunk);
    }
    tallies.reset(new Tally[static_cast<size_t>(remaining)]);
    tasks = remaining * (grouped && stripes.divided ? 2 : 1);
    if (!samples_decays(*e, s, grouped)) return;
    const int64_t units = !grouped ? e->numel : e->index ? e->groups : e->bands * e->groups;
    stride = std::max<int64_t>(1, units / SAMPLE);
    samples = (units + stride - 1) / stride;
    sample.reset(new double[static_cast<size_t>(samples)]);
  }

  void run(int64_t task) {
    if (grouped && stripes.divided) return run_part(task);
    Tally& tally = tallies[static_cast<size_t>(task)];
    if (!grouped) {
      f->single(*e, k, task * chunk, std::min(e->numel, (task + 1) * chunk), tally, sample.get(), stride);
    } else {
      double own_sums[4 * MAX_STRIPE], own_shrink[MAX_STRIPE], own_shift[MAX_STRIPE];
      const int64_t size = stripes.sums_size();
      stripes.visit(task, [&](int64_t, const Stripe& stripe, int64_t begin, int64_t end) {
        std::fill(own_sums, own_sums + size, 0.0);
        f->survey(*e, k, stripe, begin, end, own_sums, false);
        f->combine(*e, k, stripe, own_sums, 1, size, nullptr, own_shrink, own_shift, tally, sample.get(), stride);
        f->move(*e, k, stripe, begin, end, own_shrink, own_shift, tally);
      });
    }
    if (--remaining == 0) finish();
  }

  // Stripes are moved one stripe after they are surveyed, while their memory may still be in the last-level cache:
  // survey 0, survey 1, move 0, survey 2, move 1, ...  Tasks are taken in this order, so a thread that waits
  // for a stripe waits for tasks that are already running.
  void run_part(int64_t task) {
    const int64_t turn = task / stripes.parts, part = task % stripes.parts, last = 2 * stripes.count - 1;
    const bool moving = turn == last || (turn > 0 && turn % 2 == 0);
    const int64_t i = turn == last ? stripes.count - 1 : moving ? turn / 2 - 1 : (turn + 1) / 2;
    const Stripe stripe = stripes.stripe(i);
    int64_t begin, end;
    stripes.bounds(stripe, part, begin, end);
    const int64_t size = stripes.sums_size(), wide = e->dtype == FP64 ? sizeof(double) : sizeof(float);
    double* all_sums = sums.get() + i * stripes.parts * size;
    char *to_shrink = shrink.get() + i * stripes.numbers * wide, *to_shift = shift.get() + i * stripes.numbers * wide;
    std::atomic<int64_t>& waiting = surveying[static_cast<size_t>(i)];
    if (moving) {
      for (int spins = 0; waiting.load(std::memory_order_acquire) >= 0; spins++)
        if (spins < 1000) cpu_relax();
        else std::this_thread::yield();  // more threads than cores: the surveying thread may need this core
      Tally& tally = tallies[static_cast<size_t>(i * stripes.parts + part)];
      f->move(*e, k, stripe, begin, end, to_shrink, to_shift, tally);
      if (--remaining == 0) finish();
      return;
    }
    double* own = all_sums + part * size;
    std::fill(own, own + size, 0.0);
    f->survey(*e, k, stripe, begin, end, own, false);
    if (--waiting == 0) {
      Tally& tally = tallies[static_cast<size_t>(i * stripes.parts)];
      const double* counts = e->index ? all_sums + 4 * e->groups : nullptr;
      f->combine(*e, k, stripe, all_sums, stripes.parts, size, counts, to_shrink, to_shift, tally, sample.get(),
                 this->stride);
      waiting.store(-1, std::memory_order_release);
    }
  }

  void finish() {
    const int64_t count = grouped ? stripes.tasks : tasks;
    Tally all;
    for (int64_t i = 0; i < count; i++) {
      const Tally& own = tallies[static_cast<size_t>(i)];
      all.add(own.sum, own.square, own.zeros);
    }
    e->zeros = all.zeros;
    if (!e->imbalance || e->retraction == SPARSE_FREE || e->retraction == PLAIN) return;
    decay_imbalance(*e, k, sample.get(), samples, all);
  }
};

// Steps all of them in one sweep.
void step_tensors(Entry* const* entries, int64_t count, const Settings& s) {
  std::vector<TensorWork> works(static_cast<size_t>(count));
  int64_t tasks = 0, elements = 0;
  for (int64_t i = 0; i < count; i++) {
    TensorWork& w = works[static_cast<size_t>(i)];
    w.partition(*entries[i], s);
    w.first_task = tasks;
    tasks += w.tasks, elements += w.e->numel;
  }
  for (TensorWork& w : works) count_step(*w.e), w.k = step_constants(*w.e, s);
  sweep(tasks, elements, s, [&](int64_t task) {
    TensorWork& w = owner_of(works, task);
    w.run(task - w.first_task);
  });
}

}  // namespace
}  // namespace symopt
