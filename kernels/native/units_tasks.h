// How units that span several parameters are divided into tasks, and what is combined between the two sweeps.

#pragma once

#include "imbalance.h"
#include "tasks.h"

namespace symopt {
namespace {

// One parameter of units.
struct SlicesWork {
  Entry* e = nullptr;
  const UnitsPart* part = nullptr;
  const Functions* f = nullptr;
  const StepConstants<double>* k = nullptr;
  int64_t first_task = 0;
  Stripes stripes;

  void partition(Entry& entry, const UnitsPart& of, const Settings& s, const StepConstants<double>& constants) {
    e = &entry, part = &of, f = &functions_of(s, entry), k = &constants;
    stripes.partition(entry);
  }
};

// All parameters of several entries, in one sweep.
struct UnitsWork {
  const UnitsEntry* const* entries;
  int64_t count, tasks = 0, elements = 0;
  std::vector<StepConstants<double>> constants;
  std::vector<SlicesWork> works;
  std::vector<size_t> first_work;  // of every entry, and one behind the last

  UnitsWork(const UnitsEntry* const* units, int64_t number, const Settings& s)
      : entries(units), count(number), constants(static_cast<size_t>(number)) {
    for (int64_t i = 0; i < count; i++) {
      first_work.push_back(works.size());
      for (int64_t t = 0; t < entries[i]->parameter_count; t++) {
        SlicesWork w;
        w.partition(*entries[i]->parameters[t], entries[i]->parts[t], s, constants[static_cast<size_t>(i)]);
        w.first_task = tasks;
        tasks += w.stripes.tasks, elements += w.e->numel;
        works.push_back(w);
      }
    }
    first_work.push_back(works.size());
  }

  // f(work, its number, task within it) for all tasks.
  template <class F> void visit(const Settings& s, const F& f) {
    sweep(tasks, elements, s, [&](int64_t task) {
      SlicesWork& w = owner_of(works, task);
      f(w, static_cast<size_t>(&w - works.data()), task - w.first_task);
    });
  }
};

// Turns sums of the parts of a stripe, `size` apart, into sums of its slices, (4, slices).
void fold_columns(const Stripe& stripe, const double* sums, int64_t parts, int64_t size, int64_t slices, double* to) {
  const int64_t run = stripe.groups == 1 ? 1 : stripe.run, pitch = stripe.groups == 1 ? 1 : stripe.width;
  for (int64_t q = 0; q < 4; q++)
    for (int64_t j = 0; j < stripe.groups; j++) {
      double total = 0;
      for (int64_t i = q * pitch + j * run; i < q * pitch + (j + 1) * run; i++) {
        double column = 0;
        for (int64_t p = 0; p < parts; p++) column += sums[p * size + i];
        total += column;
      }
      to[q * slices + stripe.group + j] = total;
    }
}

// Adds sums of slices to those of units, in terms of w / factor.
void add_slices(const UnitsPart& part, int64_t slices, const double* of_slices, int64_t units, double* sums) {
  const double square = part.factor * part.factor, factors[4] = {square, square, 1, 1 / square};
  for (int q = 0; q < 4; q++)
    for (int64_t j = 0; j < slices; j++)
      if (part.index[j] >= 0) sums[q * units + part.index[j]] += factors[q] * of_slices[q * slices + j];
}

// Advances the first moments of all parameters, and finds the sums of every unit over them.
void survey_units(const UnitsEntry* const* entries, int64_t count, const Settings& s) {
  UnitsWork all(entries, count, s);
  struct Sums {
    std::vector<double> parts, slices;
  };
  std::vector<Sums> sums(all.works.size());
  for (size_t i = 0; i < sums.size(); i++) {
    const Stripes& stripes = all.works[i].stripes;
    sums[i].slices.resize(static_cast<size_t>(4 * all.works[i].e->groups));
    if (stripes.divided) sums[i].parts.resize(static_cast<size_t>(stripes.tasks * stripes.sums_size()));
  }
  for (int64_t i = 0; i < count; i++) {
    const Entry& e = *entries[i]->parameters[0];
    count_step(e);
    all.constants[static_cast<size_t>(i)] = step_constants(e, s);
  }
  all.visit(s, [&](SlicesWork& w, size_t i, int64_t task) {
    const int64_t size = w.stripes.sums_size();
    w.stripes.visit(task, [&](int64_t, const Stripe& stripe, int64_t begin, int64_t end) {
      double own[4 * MAX_STRIPE], *to = w.stripes.divided ? sums[i].parts.data() + task * size : own;
      std::fill(to, to + size, 0.0);
      w.f->survey(*w.e, *w.k, stripe, begin, end, to, false);
      if (!w.stripes.divided) fold_columns(stripe, to, 1, 0, w.e->groups, sums[i].slices.data());
    });
  });
  sweep(count, all.elements, s, [&](int64_t i) {
    const UnitsEntry& units = *entries[i];
    std::fill(units.sums, units.sums + 4 * units.count, 0.0);
    for (size_t j = all.first_work[static_cast<size_t>(i)]; j < all.first_work[static_cast<size_t>(i) + 1]; j++) {
      const SlicesWork& w = all.works[j];
      const int64_t size = w.stripes.sums_size(), parts = w.stripes.parts;
      for (int64_t n = 0; w.stripes.divided && n < w.stripes.count; n++) {
        const double* of_stripe = sums[j].parts.data() + n * parts * size;
        fold_columns(w.stripes.stripe(n), of_stripe, parts, size, w.e->groups, sums[j].slices.data());
      }
      add_slices(*w.part, w.e->groups, sums[j].slices.data(), units.count, units.sums);
    }
  });
}

// Columns of a part that belong to no unit, neighbours together; `first` is where the second moments of the part begin
// and, afterwards, end.
std::vector<UnboundColumns> unbound_columns(const Entry& e, const UnitsPart& part, int64_t& first) {
  std::vector<UnboundColumns> found;
  int64_t rank = 0;
  for (int64_t j = 0; j < e.groups; j++) {
    if (part.index[j] >= 0) continue;
    if (found.empty() || found.back().end != j * e.run)
      found.push_back({j * e.run, j * e.run, first + rank * e.run, 0});
    found.back().end += e.run;
    rank++;
  }
  for (UnboundColumns& columns : found) columns.stride = rank * e.run;
  first += rank * e.run * e.rows;
  return found;
}

// Advances the second moment and decides the gate of every unit from its sums, and moves the weights of all parameters.
void move_units(const UnitsEntry* const* entries, int64_t count, const Settings& s) {
  UnitsWork all(entries, count, s);
  struct Unit {
    std::vector<double> shrink, shift, sample;  // the first two in the precision of the step
    int64_t stride = 1;
    Tally tally;
  };
  std::vector<Unit> units(static_cast<size_t>(count));
  std::vector<std::vector<UnboundColumns>> unbound;
  std::vector<std::vector<Tally>> tallies;
  for (int64_t i = 0; i < count; i++) {
    const Entry& e = *entries[i]->parameters[0];
    Unit& u = units[static_cast<size_t>(i)];
    const int64_t n = entries[i]->count;
    all.constants[static_cast<size_t>(i)] = step_constants(e, s);
    u.shrink.resize(static_cast<size_t>(n)), u.shift.resize(static_cast<size_t>(n));
    u.stride = std::max<int64_t>(1, n / SAMPLE);
    if (samples_decays(e, s, true)) u.sample.resize(static_cast<size_t>((n + u.stride - 1) / u.stride));
    int64_t first = n;
    for (size_t j = all.first_work[static_cast<size_t>(i)]; j < all.first_work[static_cast<size_t>(i) + 1]; j++) {
      unbound.push_back(unbound_columns(*all.works[j].e, *all.works[j].part, first));
      tallies.emplace_back(static_cast<size_t>(all.works[j].stripes.tasks));
    }
  }
  sweep(count, all.elements, s, [&](int64_t i) {
    const UnitsEntry& entry = *entries[i];
    const Entry& e = *entry.parameters[0];
    Unit& u = units[static_cast<size_t>(i)];
    const Stripe whole = {0, 0, entry.count, 1, 0, entry.count, 1};
    functions_of(s, e).combine(e, all.constants[static_cast<size_t>(i)], whole, entry.sums, 1, 0, entry.sizes,
                               u.shrink.data(), u.shift.data(), u.tally, u.sample.empty() ? nullptr : u.sample.data(),
                               u.stride);
  });
  all.visit(s, [&](SlicesWork& w, size_t i, int64_t task) {
    const auto after = std::upper_bound(all.first_work.begin(), all.first_work.end(), i);
    const Unit& u = units[static_cast<size_t>(after - all.first_work.begin() - 1)];
    w.stripes.visit(task, [&](int64_t, const Stripe& stripe, int64_t begin, int64_t end) {
      w.f->move_slices(*w.e, *w.k, *w.part, stripe, begin, end, u.shrink.data(), u.shift.data(), unbound[i].data(),
                       int64_t(unbound[i].size()), tallies[i][static_cast<size_t>(task)]);
    });
  });
  for (size_t i = 0; i < tallies.size(); i++) {
    all.works[i].e->zeros = 0;
    for (const Tally& own : tallies[i]) all.works[i].e->zeros += own.zeros;
  }
  for (int64_t i = 0; i < count; i++) {
    const Entry& e = *entries[i]->parameters[0];
    Unit& u = units[static_cast<size_t>(i)];
    if (!e.imbalance) continue;
    double* sample = u.sample.empty() ? nullptr : u.sample.data();
    decay_imbalance(e, all.constants[static_cast<size_t>(i)], sample, int64_t(u.sample.size()), u.tally);
  }
}

}  // namespace
}  // namespace symopt
