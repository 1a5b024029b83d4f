// Which weights a task covers, in which order; compiled once per instruction set, like native_step.h.
//
// Single weights are cut into chunks.  Groups are cut into units: one group whose members form long runs, or a stripe of
// neighbouring groups with short ones, summed column by column.  A unit that fits the cache is summed and moved at once,
// so that memory is read once; a larger one is summed in parts (phase 1), then moved in parts (phase 2).  The cut depends
// on the shape alone and partial sums are added in its order, so results do not depend on the number of threads.

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

// ----------------------------------------------------------------------------------------------------- single weights

template <class T>
static auto pick_free(bool coupled, bool saturated, bool rebalance) {
  if (rebalance)
    return coupled ? (saturated ? sparse_free<T, true, true, true> : sparse_free<T, true, false, true>)
                   : (saturated ? sparse_free<T, false, true, true> : sparse_free<T, false, false, true>);
  return coupled ? (saturated ? sparse_free<T, true, true, false> : sparse_free<T, true, false, false>)
                 : (saturated ? sparse_free<T, false, true, false> : sparse_free<T, false, false, false>);
}

template <class T, class W>
static void single(const Entry& e, const Law<T>& k, int64_t begin, int64_t end, Tally& tally, double* sample,
                   int64_t stride) {
  Block<T, W> b;
  auto retract = [&]() -> int32_t {
    bool coupled = k.direction == ADAM;
    if (e.retraction == PLAIN) return plain(b.n, b.w, b.u, k);
    if (e.retraction == SPARSE) {
      auto f = coupled ? (k.saturated ? sparse<T, true, true> : sparse<T, true, false>)
                       : (k.saturated ? sparse<T, false, true> : sparse<T, false, false>);
      return f(b.n, b.w, b.u, b.gain, k, tally);
    }
    auto f = pick_free<T>(coupled, k.saturated, k.imbalance_decay >= 0);
    T *factor_0 = static_cast<T*>(e.factor_0) + b.at, *factor_1 = static_cast<T*>(e.factor_1) + b.at;
    mend<T, W>(b.n, b.w, factor_0, factor_1, k.imbalance);
    return f(b.n, b.w, factor_0, factor_1, b.u, b.gain, k);
  };
  for (int64_t i = begin; i < end; i += BLOCK) {
    b.open(e, k, i, end - i < BLOCK ? end - i : BLOCK);
    if (k.direction == SGD) {
      b.direct(e, k);
    } else {
      auto f = e.peak ? adam<T, true> : adam<T, false>;
      T* peak = e.peak ? static_cast<T*>(e.peak) + i : nullptr;
      f(b.n, b.g, static_cast<T*>(e.first) + i, static_cast<T*>(e.second) + i, peak, b.update_copy, b.gain, k);
      b.u = b.update_copy;
    }
    if (sample)
      for (int64_t j = (i + stride - 1) / stride * stride; j < i + b.n; j += stride)
        sample[j / stride] = (size(b.w[j - i]) <= k.threshold ? k.outside : k.inside) *
                             (k.direction == ADAM ? b.gain[j - i] : T(1));
    tally.zeros += b.close(e, retract());
  }
}

// ------------------------------------------------------------------------------------------------------------- groups

// One group's step from its four sums: reference.py's `adam` with a shared second moment, then its `group`.
template <class T>
static void decide(const Entry& e, const Law<double>& k, int64_t group, double count, double gg, double uu, double uw,
                   double ww, T& keep, T& shift, Tally& tally, double* sample, int64_t stride) {
  double lr = k.lr, gain = 1;
  if (k.direction != SGD) {
    T *second = static_cast<T*>(e.second) + group, *peak = static_cast<T*>(e.peak) + group;
    double v = k.beta2 * *second + k.fresh2 * (gg / count);
    *second = T(v);
    if (e.peak) *peak = T(v = v <= *peak ? double(*peak) : v);
    double p = 1 / (root(v * k.unbias2) + k.eps);
    lr *= p * k.unbias1;
    gain = k.direction == ADAM ? p : root(count);
  }
  double decay = (root(ww) <= k.threshold ? k.outside : k.inside) * gain;
  if (sample && group % stride == 0) sample[group / stride] = decay;
  double metric = root(k.imbalance * k.imbalance + 4 * ww), pull = lr * root(uu);
  double t = k.saturated ? 1 / larger(metric, larger(k.metric_scale, decay + pull)) : 1 / larger(decay, 1.0);
  double gate_sq = (k.imbalance + metric) / 2, rho = 1 - t * decay;
  double shared = rho - t * lr * uw / larger(gate_sq, double(Law<T>::smallest));
  double a = shared * rho, b = shared * gate_sq * t * lr;
  double far = a * a * ww - 2 * a * b * uw + b * b * uu;
  far = far < 0 ? 0 : root(far);
  bool snapped = far <= SNAP * k.metric_scale && pull < decay;
  keep = snapped ? T(0) : T(a);
  shift = snapped ? T(0) : T(b);
  if (!snapped && far <= Law<double>::largest) tally.add(far, far * far, 0);
}

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

// Phase 1.  sums is [4] for one long group, [4][width] for a stripe, [5][groups] for an index (the fifth counts).
template <class T, class W>
static void reduce(const Entry& e, const Law<T>& k, const Unit& unit, int64_t first, int64_t last, double* sums) {
  Block<T, W> b;
  walk(unit, first, last, [&](int64_t at, int64_t n) {
    b.open(e, k, at, n);
    b.direct(e, k);
    if (e.index) {
      for (int64_t i = 0; i < n; i++) {
        double *s = sums + e.index[at + i], x = b.g[i], y = b.u[i], z = b.w[i];
        s[0] += x * x, s[e.groups] += y * y, s[2 * e.groups] += y * z, s[3 * e.groups] += z * z, s[4 * e.groups] += 1;
      }
    } else if (unit.groups == 1) {
      add_sums(n, b.g, b.u, b.w, sums);
    } else {
      add_columns(n, b.g, b.u, b.w, sums, unit.width);
    }
  });
}

// Between the phases: sums of `parts` parts -> the two numbers of every group of the unit.
template <class T>
static void settle(const Entry& e, const Law<double>& k, const Unit& unit, double* sums, int64_t parts, int64_t stride_p,
                   T* keep, T* shift, Tally& tally, double* sample, int64_t stride) {
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < stride_p; i++) sums[i] += sums[p * stride_p + i];
  if (e.index) {
    for (int64_t j = 0; j < e.groups; j++)
      decide(e, k, j, sums[4 * e.groups + j], sums[j], sums[e.groups + j], sums[2 * e.groups + j], sums[3 * e.groups + j],
             keep[j], shift[j], tally, sample, stride);
    return;
  }
  double count = double(unit.rows) * unit.run;
  if (unit.groups == 1)
    return decide(e, k, unit.group, count, sums[0], sums[1], sums[2], sums[3], keep[0], shift[0], tally, sample, stride);
  for (int64_t j = 0; j < unit.groups; j++) {
    double s[4] = {};
    for (int q = 0; q < 4; q++)
      for (int64_t i = 0; i < unit.run; i++) s[q] += sums[q * unit.width + j * unit.run + i];
    T a, c;
    decide(e, k, unit.group + j, count, s[0], s[1], s[2], s[3], a, c, tally, sample, stride);
    for (int64_t i = 0; i < unit.run; i++) keep[j * unit.run + i] = a, shift[j * unit.run + i] = c;
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
      [](const Entry& e, const Law<double>& k, int64_t begin, int64_t end, Tally& tally, double* sample, int64_t stride) {
        single<T, W>(e, Law<T>(k), begin, end, tally, sample, stride);
      },
      [](const Entry& e, const Law<double>& k, const Unit& unit, int64_t first, int64_t last, double* sums) {
        reduce<T, W>(e, Law<T>(k), unit, first, last, sums);
      },
      [](const Entry& e, const Law<double>& k, const Unit& unit, double* sums, int64_t parts, int64_t size, void* keep,
         void* shift, Tally& tally, double* sample, int64_t stride) {
        settle<T>(e, k, unit, sums, parts, size, static_cast<T*>(keep), static_cast<T*>(shift), tally, sample, stride);
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
