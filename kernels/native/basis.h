// The step of weights whose coordinates in a few directions shall vanish: kernels/mirror.py for an orthonormal basis.
//
// Included like elementwise.h, once per instruction set.  What all directions have of a block of weights lies together, so
// that the basis is read as one stream; one second moment serves all weights.

#define LOOP [[gnu::noinline]] static  // as in elementwise.h

template <class T> LOOP double inner(int64_t n, const T* x, const T* y) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return double(sum);
}

template <class T> LOOP void add_direction(int64_t n, T* __restrict w, const T* __restrict direction, T factor) {
  for (int64_t i = 0; i < n; i++) w[i] += factor * direction[i];
}

// Adds sum g^2, sum u^2, then the coordinates of the weight and of the update.
template <class T, class W>
static void project(const Entry& e, const Law<T>& k, int64_t begin, int64_t end, int64_t columns, double* sums) {
  Block<T, W> b;
  for (int64_t i = begin; i < end; i += BLOCK) {
    const T* basis = static_cast<const T*>(e.factor_0) + i * columns;
    b.open(e, k, i, std::min(end - i, BLOCK)), b.direct(e, k);
    if (k.direction != SGD) sums[0] += inner(b.n, b.g, b.g);
    sums[1] += inner(b.n, b.u, b.u);
    for (int64_t j = 0; j < columns; j++) {
      sums[2 + j] += inner(b.n, basis + j * BLOCK, static_cast<const T*>(b.w));
      sums[2 + columns + j] += inner(b.n, basis + j * BLOCK, b.u);
    }
  }
}

template <class T, class W>
static void lift(const Entry& e, const Law<T>& k, int64_t begin, int64_t end, int64_t columns, const Move* moves) {
  Block<T, W> b;
  const T forth = T(moves[0].forth);
  for (int64_t i = begin; i < end; i += BLOCK) {
    const T* basis = static_cast<const T*>(e.factor_0) + i * columns;
    b.recall(e, k, i, std::min(end - i, BLOCK));
    drift(b.n, b.w, b.u, forth, T(0));
    for (int64_t j = 0; j < columns; j++) add_direction(b.n, b.w, basis + j * BLOCK, T(moves[j].add));
    b.close(e, 0);
  }
}

template <class T, class W> static const BasisFunctions* basis_functions() {
  static const BasisFunctions table = {
      [](const Entry& e, const Law<double>& k, int64_t begin, int64_t end, int64_t columns, double* sums) {
        project<T, W>(e, Law<T>(k), begin, end, columns, sums);
      },
      [](const Entry& e, const Law<double>& k, int64_t begin, int64_t end, int64_t columns, const Move* moves) {
        lift<T, W>(e, Law<T>(k), begin, end, columns, moves);
      },
      second_moment<T>};
  return &table;
}

static const BasisFunctions* const basis_table[] = {basis_functions<float, float>(), basis_functions<double, double>(),
                                                    basis_functions<float, Bfloat>(), basis_functions<float, Half>()};

#undef LOOP
