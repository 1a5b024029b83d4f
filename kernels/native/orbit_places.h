// Where the copies of orbits lie: blocks of them are gathered, and what was written is scattered.

#pragma once

#include "block.h"

namespace symopt {
namespace {

// 16 bytes of elements of a size, and every second element of two such vectors side by side.
template <size_t> struct Unsigned;
template <> struct Unsigned<2> { using type = uint16_t __attribute__((vector_size(16))); };
template <> struct Unsigned<4> { using type = uint32_t __attribute__((vector_size(16))); };
template <> struct Unsigned<8> { using type = uint64_t __attribute__((vector_size(16))); };
template <size_t N> using Lanes = typename Unsigned<N>::type;

#ifdef __clang__
#define SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif
inline Lanes<2> low(Lanes<2> a, Lanes<2> b) { return SHUFFLE(0, 8, 1, 9, 2, 10, 3, 11); }
inline Lanes<2> high(Lanes<2> a, Lanes<2> b) { return SHUFFLE(4, 12, 5, 13, 6, 14, 7, 15); }
inline Lanes<4> low(Lanes<4> a, Lanes<4> b) { return SHUFFLE(0, 4, 1, 5); }
inline Lanes<4> high(Lanes<4> a, Lanes<4> b) { return SHUFFLE(2, 6, 3, 7); }
inline Lanes<8> low(Lanes<8> a, Lanes<8> b) { return SHUFFLE(0, 2); }
inline Lanes<8> high(Lanes<8> a, Lanes<8> b) { return SHUFFLE(1, 3); }
#undef SHUFFLE

// Where one copy of a block's orbits lies: `rows` rows of `columns` as a tile says, or n places.
struct Where {
  int64_t n, columns;
  Tile tile;
  const int32_t* places;
};

// `columns` rows of `from` become the columns of `to`.  Cache lines of the matrix are finished one after the other,
// because lines of rows a few kilobytes apart evict each other.  WRITE: the matrix is `to`.
template <bool WRITE, class X>
void transpose(int64_t rows, int64_t columns, const X* from, int64_t from_apart, X* to, int64_t to_apart) {
  using V = Lanes<sizeof(X)>;
  constexpr int64_t L = 16 / sizeof(X);
  const int64_t outer = WRITE ? rows : columns, inner = WRITE ? columns : rows;
  for (int64_t o = 0; o < outer; o += L)
    for (int64_t i = 0; i < inner; i += L) {
      const int64_t r = WRITE ? o : i, c = WRITE ? i : o;
      if (r + L <= rows && c + L <= columns) {
        V v[L], w[L];
#pragma GCC unroll 8
        for (int64_t l = 0; l < L; l++) __builtin_memcpy(&v[l], from + (c + l) * from_apart + r, sizeof(V));
#pragma GCC unroll 3
        for (int64_t step = 1; step < L; step *= 2) {
#pragma GCC unroll 4
          for (int64_t l = 0; l < L / 2; l++)
            w[2 * l] = low(v[l], v[l + L / 2]), w[2 * l + 1] = high(v[l], v[l + L / 2]);
#pragma GCC unroll 8
          for (int64_t l = 0; l < L; l++) v[l] = w[l];
        }
#pragma GCC unroll 8
        for (int64_t l = 0; l < L; l++) __builtin_memcpy(to + (r + l) * to_apart + c, &v[l], sizeof(V));
      } else {
        for (int64_t x = c; x < smaller(c + L, columns); x++)
          for (int64_t y = r; y < smaller(r + L, rows); y++) to[y * to_apart + x] = from[x * from_apart + y];
      }
    }
}

// Copies whole pieces of a row; returns how many elements.
template <int64_t BYTES, class X> int64_t copy_pieces(int64_t n, const X* from, X* to) {
  constexpr int64_t L = BYTES / sizeof(X);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    __builtin_memcpy(to + i, from + i, BYTES);
    asm volatile("" ::: "memory");  // else compilers call memmove for every row
  }
  return i;
}

template <class X>
void copy_rows(int64_t rows, int64_t columns, const X* from, int64_t from_apart, X* to, int64_t to_apart) {
  for (int64_t r = 0; r < rows; r++, from += from_apart, to += to_apart) {
    int64_t c = copy_pieces<64>(columns, from, to);
    c += copy_pieces<16>(columns - c, from + c, to + c);
    for (; c < columns; c++) to[c] = from[c];
  }
}

template <class X> LOOP void gather_as(const Where w, const void* from, void* __restrict to_bytes) {
  const X* x = static_cast<const X*>(from);
  X* to = static_cast<X*>(to_bytes);
  const int64_t rows = w.tile.rows, columns = w.columns, down = w.tile.down, across = w.tile.across;
  if (!rows)
    for (int64_t i = 0; i < w.n; i++) to[i] = x[w.places[i]];
  x += w.tile.at;
  if (across == 1 || columns == 1)
    copy_rows(rows, columns, x, down, to, columns);
  else if (down == 1)
    transpose<false>(rows, columns, x, across, to, columns);
  else
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) to[r * columns + c] = x[r * down + c * across];
}

template <class X> LOOP void scatter_as(const Where w, const void* __restrict from_bytes, void* to) {
  const X* from = static_cast<const X*>(from_bytes);
  X* x = static_cast<X*>(to);
  const int64_t rows = w.tile.rows, columns = w.columns, down = w.tile.down, across = w.tile.across;
  if (!rows)
    for (int64_t i = 0; i < w.n; i++) x[w.places[i]] = from[i];
  x += w.tile.at;
  if (across == 1 || columns == 1)
    copy_rows(rows, columns, from, columns, x, down);
  else if (down == 1)
    transpose<true>(columns, rows, from, columns, x, across);
  else
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) x[r * down + c * across] = from[r * columns + c];
}

// Of elements of precision T, or of half-precision numbers.
template <class T> void gather(bool half, const Where& w, const void* from, void* to) {
  if (sizeof(T) == 4 && half) gather_as<uint16_t>(w, from, to);
  else gather_as<T>(w, from, to);
}

template <class T> void scatter(bool half, const Where& w, const void* from, void* to) {
  if (sizeof(T) == 4 && half) scatter_as<uint16_t>(w, from, to);
  else scatter_as<T>(w, from, to);
}

// Length of arrays that hold a block: were it a multiple of a page, a dozen of them would conflict in a cache of eight
// ways.
constexpr int64_t ARRAY = BLOCK + 32;

// One copy of the orbits of a block, side by side.
template <class T> struct Gathered {
  T weight[ARRAY], grad[ARRAY];  // or half-precision numbers
  T master[ARRAY], first[ARRAY];
};

}  // namespace
}  // namespace symopt
