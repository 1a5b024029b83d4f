// Which weights a task covers, in which order; compiled once per instruction set, like elementwise.h.
//
// Single weights are cut into chunks.  Groups are cut into units: one group whose members form long runs, or a stripe
// of neighbouring groups with short ones, summed column by column.  A unit that fits the cache is summed and moved at
// once, so that memory is read once; a larger one is summed in parts (phase 1), then moved in parts (phase 2).  The cut
// depends on the shape alone and partial sums are added in its order, so results do not depend on the number of threads.

template <class T, class W> struct Block {
  T weight_copy[BLOCK], grad_copy[BLOCK], update_copy[BLOCK], gain[BLOCK];
  T* w;
  const T* g;
  const T* u;
  int64_t n, at;

  void open(const Entry& e, const Law<T>& k, int64_t start, int64_t count, bool need_grad = true) {
    at = start, n = count;
    W* weight = static_cast<W*>(e.weight) + at;
    const W* grad = static_cast<const W*>(e.grad) + at;
    if constexpr (std::is_same<T, W>::value) {
      w = weight, g = grad;
    } else {
      load(n, weight, weight_copy);
      if (e.master) {
        // The copy counts where it still rounds to the weight; elsewhere somebody changed the weight.
        W rounded[BLOCK];
        const float* master = static_cast<const float*>(e.master) + at;
        store(n, master, rounded);
        for (int64_t i = 0; i < n; i++) weight_copy[i] = rounded[i].bits == weight[i].bits ? master[i] : weight_copy[i];
      }
      w = weight_copy;
      if (need_grad) load(n, grad, grad_copy);
      g = grad_copy;
    }
    if (need_grad && (k.factor != 1 || k.weight_decay != 0)) {
      prepare(n, g, w, grad_copy, k.factor, k.weight_decay);
      g = grad_copy;
    }
    u = g;
  }

  // Writes back, and returns how many weights are zero in their storage format.
  int64_t close(const Entry& e, int32_t zeros) {
    if constexpr (!std::is_same<T, W>::value) {
      W* weight = static_cast<W*>(e.weight) + at;
      if (e.master) __builtin_memcpy(static_cast<float*>(e.master) + at, w, n * sizeof(float));
      store(n, w, weight);
      zeros = 0;
      for (int64_t i = 0; i < n; i++) zeros += (weight[i].bits & 0x7fff) == 0;
    }
    return zeros;
  }

  // First half of the direction: the moments that every weight owns; u is the update up to one factor per tensor.
  void direct(const Entry& e, const Law<T>& k) {
    T* buffer = static_cast<T*>(e.first) + at;
    if (k.direction != SGD) {
      first_moment(n, g, buffer, k.fresh1);
      u = buffer;
    } else if (e.first) {
      if (k.nesterov && e.fresh) sgd<T, true, true>(n, g, buffer, update_copy, k.momentum, k.undamped);
      else if (k.nesterov) sgd<T, true, false>(n, g, buffer, update_copy, k.momentum, k.undamped);
      else if (e.fresh) sgd<T, false, true>(n, g, buffer, update_copy, k.momentum, k.undamped);
      else sgd<T, false, false>(n, g, buffer, update_copy, k.momentum, k.undamped);
      u = k.nesterov ? update_copy : buffer;
    }
  }

  // The update of a block whose moments have been advanced before.
  void recall(const Entry& e, const Law<T>& k, int64_t start, int64_t count) {
    bool from_buffer = e.first && !k.nesterov;
    open(e, k, start, count, !from_buffer);
    const T* buffer = static_cast<const T*>(e.first) + at;
    if (from_buffer) {
      u = buffer;
    } else if (e.first) {
      for (int64_t i = 0; i < n; i++) update_copy[i] = g[i] + k.momentum * buffer[i];
      u = update_copy;
    }
  }
};

// Fetches the block from `at` on, ahead of time: blocks are shorter than what hardware needs to see a stream coming.
static void fetch(const void* from, int64_t at, int64_t end, int64_t each) {
  const char* p = static_cast<const char*>(from) + at * each;
  for (int64_t i = 0; from && i < std::min(end - at, BLOCK) * each; i += 64) __builtin_prefetch(p + i);
}

template <class T, class W> static void expect(const Entry& e, int64_t at, int64_t end, bool grads) {
  fetch(e.weight, at, end, sizeof(W)), fetch(e.master, at, end, sizeof(T)), fetch(e.first, at, end, sizeof(T));
  if (grads || !e.first) fetch(e.grad, at, end, sizeof(W));
}

// ----------------------------------------------------------------------------------------------------- single weights

template <class T, class W>
static void single(const Entry& e, const Law<T>& k, int64_t begin, int64_t end, Tally& tally, double* sample,
                   int64_t stride) {
  Block<T, W> b;
  auto retract = [&]() -> int32_t {
    if (e.retraction == PLAIN) return plain(b.n, b.w, b.u, k);
    if (e.retraction == SPARSE) return sparse(b.n, b.w, b.u, b.gain, k, tally);
    T *factor_0 = static_cast<T*>(e.factor_0) + b.at, *factor_1 = static_cast<T*>(e.factor_1) + b.at;
    mend<T, W>(b.n, b.w, factor_0, factor_1, k.imbalance);
    return sparse_free(b.n, b.w, factor_0, factor_1, b.u, b.gain, k);
  };
  const int64_t whole = e.of ? BLOCK / e.of * e.of : BLOCK;
  for (int64_t i = begin; i < end; i += whole) {
    b.open(e, k, i, std::min(end - i, whole));
    if (k.direction == SGD) {
      b.direct(e, k);
    } else {
      T* peak = e.peak ? static_cast<T*>(e.peak) + i : nullptr;
      adam(b.n, b.g, static_cast<T*>(e.first) + i, static_cast<T*>(e.second) + i, peak, b.update_copy, b.gain, k);
      b.u = b.update_copy;
    }
    if (k.of) rank(b.n, b.w, b.gain, k.keep, k.of, k.inside, k.outside);
    if (sample)
      for (int64_t j = (i + stride - 1) / stride * stride; j < i + b.n; j += stride)
        sample[j / stride] = (k.of ? T(1) : size(b.w[j - i]) <= k.threshold ? k.outside : k.inside) *
                             (source(k) != UNIFORM ? b.gain[j - i] : T(1));
    tally.zeros += b.close(e, retract());
  }
}

// ------------------------------------------------------------------------------------------------------------- groups

// Calls f(offset, length) for the blocks of [first, last), which counts the unit's elements row by row.
template <class F>
static void walk(const Unit& unit, int64_t first, int64_t last, const F& f) {
  for (int64_t i = first; i < last;) {
    int64_t row = i / unit.width, column = i % unit.width;
    int64_t n = unit.width - column;
    n = n < BLOCK ? n : BLOCK;
    n = n < last - i ? n : last - i;
    f(unit.base + row * unit.row_stride + column, n);
    i += n;
  }
}

// Phase 1.  sums is [4] for one group with long runs, [4][width] for a stripe, [5][groups] for an index (the fifth
// counts members).
template <class T, class W, bool ADAPTIVE, bool MEANS>
static void reduce(const Entry& e, const Law<T>& k, const Unit& unit, int64_t first, int64_t last, double* sums) {
  Block<T, W> b;
  walk(unit, first, last, [&](int64_t at, int64_t n) {
    expect<T, W>(e, at + n, e.numel, true);
    b.open(e, k, at, n);
    b.direct(e, k);
    if (!e.index) return add_sums<T, ADAPTIVE, MEANS>(n, b.g, b.u, b.w, sums);
    for (int64_t i = 0; i < n; i++) {
      double *s = sums + e.index[at + i], x = b.g[i], y = b.u[i], z = b.w[i];
      s[0] += x * x, s[e.groups] += y * y, s[2 * e.groups] += y * z, s[3 * e.groups] += z * z, s[4 * e.groups] += 1;
    }
  });
}

template <class T, class W, bool ADAPTIVE, bool MEANS>
static void reduce_stripe(const Entry& e, const Law<T>& k, const Unit& unit, int64_t first, int64_t last,
                          double* sums) {
  constexpr int64_t TOGETHER = 4, PRECISE = 32;  // rows of one visit, and rows summed before they go to double
  Block<T, W> b[TOGETHER];
  T columns[4 * STRIPE];
  const int64_t end = last / unit.width;
  for (int64_t top = first / unit.width; top < end; top += PRECISE) {
    std::fill(columns, columns + 4 * unit.width, T(0));
    const int64_t bottom = std::min(end, top + PRECISE);
    for (int64_t row = top; row < bottom; row += TOGETHER)
      for (int64_t column = 0; column < unit.width; column += BLOCK) {
        const int64_t n = std::min(BLOCK, unit.width - column), rows = std::min(TOGETHER, bottom - row);
        const T *g[TOGETHER], *u[TOGETHER], *w[TOGETHER];
        for (int64_t r = 0; r < rows; r++) {
          const int64_t at = unit.base + (row + r) * unit.row_stride + column;
          expect<T, W>(e, at + TOGETHER * unit.row_stride, e.numel, true);
          b[r].open(e, k, at, n);
          b[r].direct(e, k);
          g[r] = b[r].g, u[r] = b[r].u, w[r] = b[r].w;
        }
        auto add = rows == 4   ? add_columns<T, ADAPTIVE, MEANS, 4>
                   : rows == 3 ? add_columns<T, ADAPTIVE, MEANS, 3>
                   : rows == 2 ? add_columns<T, ADAPTIVE, MEANS, 2>
                               : add_columns<T, ADAPTIVE, MEANS, 1>;
        add(n, g, u, w, columns + column, unit.width);
      }
    for (int64_t i = 0; i < 4 * unit.width; i++) sums[i] += columns[i];
  }
}

template <class T, class W, bool MEANS>
static void sum_up(const Entry& e, const Law<double>& k, const Unit& unit, int64_t first, int64_t last, double* sums) {
  const bool adaptive = k.direction != SGD, striped = !e.index && unit.groups > 1;
  auto f = striped ? (adaptive ? reduce_stripe<T, W, true, MEANS> : reduce_stripe<T, W, false, MEANS>)
                   : (adaptive ? reduce<T, W, true, MEANS> : reduce<T, W, false, MEANS>);
  f(e, Law<T>(k), unit, first, last, sums);
}

// Between the phases: sums of `parts` parts, `size` apart -> the two numbers of every group of the unit.
template <class T, int DIRECTION>
static void settle(const Entry& e, const Law<double>& k, const Unit& unit, double* sums, int64_t parts, int64_t size,
                   T* keep, T* shift, Tally& tally, double* sample, int64_t stride) {
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[p * size + i];
  constexpr int64_t AT_ONCE = 64;
  const bool direct = e.index || unit.run == 1 || unit.groups == 1;
  const int64_t pitch = e.index ? e.groups : unit.groups == 1 ? 1 : unit.width;
  const double count = double(unit.rows) * unit.run;
  for (int64_t j = 0; j < unit.groups; j += AT_ONCE) {
    const int64_t n = std::min(AT_ONCE, unit.groups - j), group = unit.group + j;
    double folded[4][AT_ONCE], decays[AT_ONCE];
    const double* s[4];
    for (int q = 0; q < 4; q++) {
      s[q] = direct ? sums + q * pitch + j : folded[q];
      for (int64_t i = 0; i < (direct ? 0 : n); i++) {
        const double* from = sums + q * pitch + (j + i) * unit.run;
        folded[q][i] = 0;
        for (int64_t r = 0; r < unit.run; r++) folded[q][i] += from[r];
      }
    }
    T own_keep[AT_ONCE], own_shift[AT_ONCE];
    T *to_keep = direct ? keep + j : own_keep, *to_shift = direct ? shift + j : own_shift;
    T *second = static_cast<T*>(e.second) + group, *peak = e.peak ? static_cast<T*>(e.peak) + group : nullptr;
    auto f = e.index ? decide<T, DIRECTION, false> : decide<T, DIRECTION, true>;
    f(n, second, peak, e.index ? sums + 4 * pitch + j : &count, s[0], s[1], s[2], s[3], to_keep, to_shift, decays, k,
      tally);
    for (int64_t i = 0; i < (direct ? 0 : n); i++)
      for (int64_t r = 0; r < unit.run; r++) {
        keep[(j + i) * unit.run + r] = own_keep[i];
        shift[(j + i) * unit.run + r] = own_shift[i];
      }
    if (sample)
      for (int64_t i = 0; i < n; i++)
        if ((group + i) % stride == 0) sample[(group + i) / stride] = decays[i];
  }
}

// Phase 2.
template <class T, class W>
static void apply(const Entry& e, const Law<T>& k, const Unit& unit, int64_t first, int64_t last, const T* keep,
                  const T* shift, Tally& tally) {
  Block<T, W> b;
  walk(unit, first, last, [&](int64_t at, int64_t n) {
    b.recall(e, k, at, n);
    int32_t zeros = 0;
    if (e.index) {
      T own_keep[BLOCK], own_shift[BLOCK];
      for (int64_t i = 0; i < n; i++) own_keep[i] = keep[e.index[at + i]], own_shift[i] = shift[e.index[at + i]];
      zeros = move_columns(n, b.w, b.u, own_keep, own_shift);
    } else if (unit.groups == 1) {
      zeros = move(n, b.w, b.u, keep[0], shift[0]);
    } else {
      int64_t column = (at - unit.base) % unit.row_stride;
      zeros = move_columns(n, b.w, b.u, keep + column, shift + column);
    }
    tally.zeros += b.close(e, zeros);
  });
}

template <class T, class W> static const Functions* functions() {
  static const Functions table = {
      [](const Entry& e, const Law<double>& k, int64_t begin, int64_t end, Tally& tally, double* sample,
         int64_t stride) {
        single<T, W>(e, Law<T>(k), begin, end, tally, sample, stride);
      },
      sum_up<T, W, false>,
      [](const Entry& e, const Law<double>& k, const Unit& unit, double* sums, int64_t parts, int64_t size, void* keep,
         void* shift, Tally& tally, double* sample, int64_t stride) {
        auto f = k.direction == SGD ? settle<T, SGD> : k.direction == ADAM ? settle<T, ADAM> : settle<T, ADAMW>;
        f(e, k, unit, sums, parts, size, static_cast<T*>(keep), static_cast<T*>(shift), tally, sample, stride);
      },
      [](const Entry& e, const Law<double>& k, const Unit& unit, int64_t first, int64_t last, const void* keep,
         const void* shift, Tally& tally) {
        apply<T, W>(e, Law<T>(k), unit, first, last, static_cast<const T*>(keep), static_cast<const T*>(shift), tally);
      }};
  return &table;
}

// In the order of enum Dtype.
static const Functions* const table[] = {functions<float, float>(), functions<double, double>(),
                                         functions<float, Bfloat>(), functions<float, Half>()};
