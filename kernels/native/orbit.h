// The step of weights that a fixed plane makes equal: kernels/reference/plane.py for orbits.
//
// Orbits of equally many copies are a segment; where its copies do not lie side by side, blocks of them are gathered
// and then scattered.  A gate of the whole plane needs its sums before any weight can move, so there are two sweeps:
// the survey advances the moments and adds up, the move writes the weights.  Without imbalance, a block whose copies
// are equal already takes the plain step whatever the gate: the survey moves it at once, and on the plane one sweep is
// enough.  One sweep is also enough where every orbit has its own gate, which needs no sums of others.

#pragma once

#include "orbit_copies.h"
#include "orbit_loops.h"
#include "orbit_places.h"

namespace symopt {
namespace {

// Whether two to four copies have loops of their own.  x86 processors without AVX2 do without, because these loops are
// half of what is compiled; the loops for any number of copies take two to five times as long.
#ifdef SYMOPT_FUSED_COPIES
constexpr bool FUSED_COPIES = true;
#else
constexpr bool FUSED_COPIES = false;
#endif

template <int N> struct Number {
  static constexpr int value = N;
};
template <Updates UPDATES> struct From {
  static constexpr Updates value = UPDATES;
};

template <class X> struct Array {
  X* x;
  explicit Array(int64_t n) : x(n ? new X[static_cast<size_t>(n)] : nullptr) {}
  Array(const Array&) = delete;
  ~Array() { delete[] x; }
  X& operator[](int64_t i) const { return x[i]; }
};

// All copies of up to BLOCK neighbouring orbits of a segment.
template <class T> struct Orbits {
  const PlaneEntry& plane;
  const Segment& s;
  const StepConstants<T>& k;
  Array<Block<T>> copies;
  Array<Gathered<T>> gathered;  // where copies do not lie side by side in memory
  Array<Entry> entries;         // what is gathered, as the blocks see it
  int64_t n = 0, at = 0, start = 0, block = 0;
  T step_scale[ARRAY];                            // Adam's preconditioner
  T w_mean[ARRAY], u_mean[ARRAY];                 // of weight and update, over the copies
  T along[ARRAY], shrink[ARRAY], shift[ARRAY];    // w' = w - along u_mean + shrink (w - w_mean) - shift (u - u_mean)
  T ww[ARRAY], uu[ARRAY], uw[ARRAY], scratch[ARRAY];  // sums over the copies, of what is off the plane

  Orbits(const PlaneEntry& p, const Segment& segment, const StepConstants<T>& constants)
      : plane(p), s(segment), k(constants), copies(s.copies), gathered(s.places ? s.copies : 0),
        entries(s.places ? s.copies : 0) {
    if (!s.places) return;
    for (int64_t j = 0; j < s.copies; j++) {
      Entry& e = entries[j];
      Gathered<T>& g = gathered[j];
      e = parameter(j);
      e.weight = g.weight, e.grad = g.grad;
      if (e.master) e.master = g.master;
      if (e.first) e.first = g.first;
    }
  }

  const Entry& parameter(int64_t j) const { return *plane.parameters[s.places ? s.of[j] : j]; }
  const Entry& entry(int64_t j) const { return s.places ? entries[j] : parameter(j); }
  Where where(int64_t j) const {
    const Tile& tile = s.tiles[j * s.count + block];
    return {n, tile.rows ? n / tile.rows : 0, tile, s.places + j * s.orbits + start};
  }

  // Gathered copies are not prefetched: pieces of many rows keep as many cache lines in flight as the core has room
  // for, so prefetching would gain nothing.
  void prefetch_orbits(int64_t begin, int64_t end, bool all) const {
    if (s.places) return;
    for (int64_t j = 0; j < s.copies; j++) prefetch_block<T>(entry(j), begin, end, all);
    prefetch(entry(0).second, begin, end, sizeof(T));
  }

  // Makes a block the current one; `all`: gradients are needed.
  void select(int64_t to, bool all) {
    block = to, start = begin_of(s, to), n = begin_of(s, to + 1) - start, at = s.places ? 0 : start;
    if (!s.places) return;
    for (int64_t j = 0; j < s.copies; j++) {
      const Entry& e = parameter(j);
      const Where w = where(j);
      Gathered<T>& g = gathered[j];
      gather<T>(is_half<T>(e), w, e.weight, g.weight);
      if (all || !e.first || k.nesterov) gather<T>(is_half<T>(e), w, e.grad, g.grad);
      if (e.master) gather<T>(false, w, e.master, g.master);
      if (e.first) gather<T>(false, w, e.first, g.first);
    }
  }

  // Writes the first moments back, which the survey has advanced.
  void scatter_moments() {
    if (!s.places) return;
    for (int64_t j = 0; j < s.copies; j++)
      if (void* first = parameter(j).first) scatter<T>(false, where(j), gathered[j].first, first);
  }

  void close() {
    for (int64_t j = 0; j < s.copies; j++) {
      copies[j].close(entry(j), 0);
      if (!s.places) continue;
      const Entry& e = parameter(j);
      scatter<T>(is_half<T>(e), where(j), gathered[j].weight, e.weight);
      if (e.master) scatter<T>(false, where(j), gathered[j].master, e.master);
    }
  }

  T* first_moment_of(int64_t j) const { return static_cast<T*>(entry(j).first) + at; }
  T* of_orbits(void* x) const { return x ? static_cast<T*>(x) + s.first + start : nullptr; }
  // The second moments behind Adam's preconditioner, once they are advanced.
  const T* second_or_peak() const { return of_orbits(entry(0).peak ? entry(0).peak : entry(0).second); }

  // -- two to four copies --------------------------------------------------------------------------------------------

  template <int N> Copies<T, N> streams() {
    Copies<T, N> c;
    for (int64_t j = 0; j < N; j++) {
      Block<T>& b = copies[j];
      c.g[j] = b.g, c.w[j] = b.w;
      c.u[j] = const_cast<T*>(b.u);  // written by the survey alone, and there only moments
    }
    return c;
  }

  // Opens the block and calls f(From, streams, second moment, peak) with where the updates of the survey come from.
  template <int N, class F> int32_t with_updates(const F& f) {
    for (int64_t j = 0; j < N; j++) copies[j].open(entry(j), k, at, n);
    const Entry& e = entry(0);
    T *second = of_orbits(e.second), *peak = of_orbits(e.peak);
    if (k.direction == SGD && (!e.first || e.fresh)) {
      for (int64_t j = 0; j < N; j++) copies[j].direct(entry(j), k);
      return f(From<GIVEN>(), streams<N>(), second, peak);
    }
    Copies<T, N> c = streams<N>();
    for (int64_t j = 0; j < N; j++) c.u[j] = first_moment_of(j);
    if (k.direction == SGD && k.nesterov) return f(From<NESTEROV>(), c, second, peak);
    if (k.direction == SGD) return f(From<MOMENTUM>(), c, second, peak);
    if (peak) return f(From<AMSGRAD>(), c, second, peak);
    return f(From<MOMENTS>(), c, second, peak);
  }

  template <int N> bool survey_few(PlaneSums& sums) {
    return with_updates<N>([&](auto from, const Copies<T, N>& c, T* second, T* peak) {
      return survey_copies<T, N, decltype(from)::value>(n, c, second, peak, scratch, k, sums);
    });
  }

  template <int N> bool step_few_by_orbit(PlaneSums& sums, Tally& tally) {
    const int32_t differing = with_updates<N>([&](auto from, const Copies<T, N>& c, T* second, T* peak) {
      auto step = k.imbalance == 0 ? step_copies_by_orbit<T, N, decltype(from)::value, true>
                                   : step_copies_by_orbit<T, N, decltype(from)::value, false>;
      return step(n, c, second, peak, k, sums, tally);
    });
    close();
    return differing;
  }

  template <int N> double move_few(const Gate& gate, bool moved) {
    for (int64_t j = 0; j < N; j++) copies[j].recall(entry(j), k, at, n);
    auto move = k.direction == SGD ? move_copies<T, N, false> : move_copies<T, N, true>;
    const double square = move(n, streams<N>(), second_or_peak(), gate, moved, k);
    close();
    return square;
  }

  // Calls f with the number of copies where there are loops for it, and says whether there are.
  template <class F> bool few(const F& f) {
    if constexpr (FUSED_COPIES) switch (s.copies) {
        case 2: return f(Number<2>()), true;
        case 3: return f(Number<3>()), true;
        case 4: return f(Number<4>()), true;
      }
    return false;
  }

  // -- a block in each sweep -----------------------------------------------------------------------------------------

  // Returns whether copies differ.
  bool survey_block(int64_t which, PlaneSums& sums) {
    select(which, true);
    bool differ = false;
    if (!few([&](auto number) { differ = this->template survey_few<decltype(number)::value>(sums); }))
      differ = advance_and_survey(sums);
    scatter_moments();
    return differ;
  }

  // The whole step of a block whose orbits have their own gates; returns whether copies differ.  `expect_equal` takes
  // the step of equal copies first, which is enough if they are equal; a look beforehand would cost what it saves.
  bool step_block_by_orbit(int64_t which, bool expect_equal, PlaneSums& sums, Tally& tally) {
    select(which, true);
    bool differ = false;
    if (!few([&](auto number) {
          constexpr int N = decltype(number)::value;
          if (!expect_equal) differ = this->template step_few_by_orbit<N>(sums, tally);
          else if ((differ = this->template survey_few<N>(sums))) this->open(false), this->move_by_orbit(tally);
          else this->write_equal();
        })) {
      differ = advance_and_survey(sums);
      if (expect_equal && !differ) write_equal();
      else move_by_orbit(tally);
    }
    scatter_moments();
    return differ;
  }

  // Returns the squared distance from the plane.
  double move_block(int64_t which, const Gate& gate, bool moved) {
    select(which, false);
    double square = 0;
    if (few([&](auto number) { square = this->template move_few<decltype(number)::value>(gate, moved); }))
      return square;
    open(false);
    return move_by_plane(gate, moved);
  }

  // The last step onto the plane: every copy becomes the mean of what the move wrote.
  void snap_block(int64_t which) {
    select(which, false);
    open(false);
    for (int64_t j = 0; j < s.copies; j++) copy(n, w_mean, copies[j].w);
    close();
  }

  // Writes the weights that the survey computed for equal copies.
  void write_equal() {
    for (int64_t j = 0; j < s.copies; j++) copy(n, scratch, copies[j].w);
    close();
  }

  // -- any number of copies ------------------------------------------------------------------------------------------

  void open(bool advance) {
    T* squares = scratch;
    fill(squares, n, T(0));
    for (int64_t j = 0; j < s.copies; j++) {
      Block<T>& b = copies[j];
      if (advance) b.open(entry(j), k, at, n), b.direct(entry(j), k);
      else b.recall(entry(j), k, at, n);
      if (advance && k.direction != SGD) add_squares(n, b.g, squares);
    }
    T *second = of_orbits(entry(0).second), *peak = of_orbits(entry(0).peak);
    if (advance && k.direction != SGD) {
      accumulate(n, squares, second, T(1) / T(s.copies) * k.one_minus_beta2, k.beta2);
      if (peak) raise(n, second, peak);
    }
    if (k.direction == SGD) fill(step_scale, n, T(1));
    else precondition(n, peak ? peak : second, step_scale, k);
    fill(w_mean, n, T(0)), fill(u_mean, n, T(0));
    for (int64_t j = 1; j < s.copies; j++) {
      add_difference(n, copies[0].w, copies[j].w, w_mean);
      add_difference(n, copies[0].u, copies[j].u, u_mean);
    }
    mean_from(n, copies[0].w, w_mean, T(1) / T(s.copies));
    mean_from(n, copies[0].u, u_mean, T(1) / T(s.copies));
    multiply(n, step_scale, along, k.lr * k.bias_correction1);
  }

  bool advance_and_survey(PlaneSums& sums) {
    open(true);
    survey_sums(sums, plane.gate_per_orbit && plane.critical);
    move_if_equal(n, w_mean, along, u_mean, scratch);
    return !copies_equal();
  }

  bool copies_equal() const {
    int32_t differing = 0;
    for (int64_t j = 1; j < s.copies && !differing; j++) differing = count_different(n, copies[0].w, copies[j].w);
    return !differing;
  }

  void sum_orbits() {
    fill(ww, n, T(0)), fill(uu, n, T(0)), fill(uw, n, T(0));
    for (int64_t j = 0; j < s.copies; j++) add_products(n, copies[j].w, copies[j].u, w_mean, u_mean, ww, uu, uw);
  }

  // Adds what one gate needs; `by_orbit`: and finds the largest pull of a single orbit.
  void survey_sums(PlaneSums& sums, bool by_orbit) {
    for (int64_t j = 0; j < s.copies; j++)
      add_plane_sums(n, copies[j].w, copies[j].u, w_mean, u_mean, step_scale, sums);
    if (k.direction == ADAM) sums.sum_inverse += sum_of_inverses(n, step_scale);
    if (!by_orbit) return;
    sum_orbits();
    keep_largest_pull(n, uu, step_scale, k.direction == ADAMW, sums);
  }

  double move_by_plane(const Gate& gate, bool moved) {
    gate_of_plane(n, step_scale, along, shrink, shift, gate, k);
    if (moved) fill(along, n, T(0));
    double square = 0;
    for (int64_t j = 0; j < s.copies; j++)
      square += move_copy(n, copies[j].w, copies[j].u, w_mean, u_mean, along, shrink, shift);
    close();
    return square;
  }

  void move_by_orbit(Tally& tally) {
    sum_orbits();
    gate_of_orbits(n, step_scale, along, ww, uu, uw, shrink, shift, k);
    fill(scratch, n, T(0));
    for (int64_t j = 0; j < s.copies; j++)
      add_rest(n, copies[j].w, copies[j].u, w_mean, u_mean, shrink, shift, scratch);
    T* snaps = ww;
    find_snaps(n, step_scale, along, uu, scratch, snaps, k, tally);
    for (int64_t j = 0; j < s.copies; j++)
      move_or_snap(n, copies[j].w, copies[j].u, w_mean, u_mean, along, shrink, shift, snaps);
    close();
  }

  // Preconditioners of orbits whose number is a multiple of `stride`.
  void take_sample(double* sample, int64_t stride) {
    const T* from = second_or_peak();
    const int64_t id = s.first + start;
    for (int64_t i = (id + stride - 1) / stride * stride; i < id + n; i += stride)
      precondition(1, from + (i - id), step_scale, k), sample[i / stride] = double(step_scale[0]);
  }
};

template <class T>
void survey_orbits(const PlaneEntry& plane, const Segment& s, const StepConstants<double>& constants, int64_t begin,
                   int64_t end, PlaneSums& sums, char* moved, Tally& tally, double* sample, int64_t stride) {
  const StepConstants<T> k(constants);
  // A strength that is no number moves weights even on the plane.
  const bool skips_gate = (k.imbalance == 0 || s.copies == 1) && (!plane.gate_per_orbit || is_finite(k.decay_kept));
  bool differ = false;  // a block is mostly like the one before
  Orbits<T> o(plane, s, k);
  for (int64_t i = begin; i < end; i++) {
    o.prefetch_orbits(begin_of(s, i + 1), s.orbits, true);
    if (plane.gate_per_orbit) {
      differ = o.step_block_by_orbit(i, skips_gate && !differ, sums, tally);
    } else {
      moved[i] = !o.survey_block(i, sums) && skips_gate;
      if (moved[i]) o.write_equal();
      else sums.unmoved++;
    }
    if (sample) o.take_sample(sample, stride);
  }
  sums.sum_inverse *= double(s.copies);
  if (s.copies == 1) sums.largest_pull = 0;  // a single weight has no pull, not even NaN
}

template <class T>
void move_orbits(const PlaneEntry& plane, const Segment& s, const StepConstants<double>& constants, int64_t begin,
                 int64_t end, const Gate& gate, const char* moved, Tally& tally) {
  const StepConstants<T> k(constants);
  const bool done = s.copies == 1 && is_finite(T(gate.own * gate.t));
  Orbits<T> o(plane, s, k);
  for (int64_t i = begin; i < end; i++)
    if (!(done && moved[i])) {
      o.prefetch_orbits(begin_of(s, i + 1), s.orbits, false);
      tally.square += o.move_block(i, gate, moved[i]);
    }
}

template <class T>
void snap_orbits(const PlaneEntry& plane, const Segment& s, const StepConstants<double>& constants, int64_t begin,
                 int64_t end) {
  const StepConstants<T> k(constants);
  Orbits<T> o(plane, s, k);
  for (int64_t i = begin; i < end && s.copies > 1; i++) o.snap_block(i);
}

}  // namespace
}  // namespace symopt
