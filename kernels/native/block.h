// A block of neighbouring weights in the precision of the step, whatever format they are stored in.

#pragma once

#include "directions.h"
#include "formats.h"

namespace symopt {
namespace {

LOOP void load_as(int64_t n, const Bfloat* from, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

LOOP void load_as(int64_t n, const Half* from, float* to) {
  int64_t i = 0;
#ifdef SYMOPT_F16C
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) to[i] = widen(from[i]);
}

LOOP void store_as(int64_t n, const float* from, Bfloat* to) {
  for (int64_t i = 0; i < n; i++) round_to(to[i], from[i]);
}

LOOP void store_as(int64_t n, const float* from, Half* to) {
  int64_t i = 0;
#ifdef SYMOPT_F16C
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) round_to(to[i], from[i]);
}

// Half-precision numbers lie in `from` and `to` as bits.
inline void load(int32_t dtype, int64_t n, const uint16_t* from, float* to) {
  if (dtype == BF16) load_as(n, reinterpret_cast<const Bfloat*>(from), to);
  else load_as(n, reinterpret_cast<const Half*>(from), to);
}

inline void store(int32_t dtype, int64_t n, const float* from, uint16_t* to) {
  if (dtype == BF16) store_as(n, from, reinterpret_cast<Bfloat*>(to));
  else store_as(n, from, reinterpret_cast<Half*>(to));
}

LOOP void keep_equal(int64_t n, const uint16_t* rounded, const uint16_t* stored, const float* master, float* w) {
  for (int64_t i = 0; i < n; i++) w[i] = rounded[i] == stored[i] ? master[i] : w[i];
}

LOOP int32_t count_zeros(int64_t n, const uint16_t* stored) {
  int32_t zeros = 0;
  for (int64_t i = 0; i < n; i++) zeros += (stored[i] & 0x7fff) == 0;
  return zeros;
}

template <class T> LOOP int32_t count_different(int64_t n, const T* x, const T* y) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; i++) count += x[i] != y[i];
  return count;
}

template <class T> inline bool is_half(const Entry& e) { return sizeof(T) == 4 && e.dtype != FP32; }

template <class T> struct Block {
  T weight_copy[BLOCK], grad_copy[BLOCK], update_copy[BLOCK], gain[BLOCK];
  T* w;
  const T* g;
  const T* u;  // the update, up to one factor per tensor or unit
  int64_t n, at;

  void open(const Entry& e, const StepConstants<T>& k, int64_t start, int64_t count, bool need_grad = true) {
    at = start, n = count;
    if constexpr (sizeof(T) == 4) {
      if (is_half<T>(e)) open_half(e, need_grad);
      else w = static_cast<T*>(e.weight) + at, g = static_cast<const T*>(e.grad) + at;
    } else {
      w = static_cast<T*>(e.weight) + at, g = static_cast<const T*>(e.grad) + at;
    }
    if (need_grad && (k.grad_factor != 1 || k.weight_decay != 0)) {
      prepare(n, g, w, grad_copy, k.grad_factor, k.weight_decay);
      g = grad_copy;
    }
    u = g;
  }

  void open_half(const Entry& e, bool need_grad) {
    const uint16_t* weight = static_cast<const uint16_t*>(e.weight) + at;
    load(e.dtype, n, weight, weight_copy);
    if (e.master) {
      // The copy counts where it still rounds to the weight; elsewhere the weight was changed from outside.
      uint16_t rounded[BLOCK];
      const float* master = static_cast<const float*>(e.master) + at;
      store(e.dtype, n, master, rounded);
      keep_equal(n, rounded, weight, master, weight_copy);
    }
    w = weight_copy;
    if (need_grad) load(e.dtype, n, static_cast<const uint16_t*>(e.grad) + at, grad_copy);
    g = grad_copy;
  }

  // Writes back, and returns how many weights are zero in their storage format.
  int64_t close(const Entry& e, int32_t zeros) {
    if constexpr (sizeof(T) == 4) {
      if (!is_half<T>(e)) return zeros;
      uint16_t* weight = static_cast<uint16_t*>(e.weight) + at;
      if (e.master) __builtin_memcpy(static_cast<float*>(e.master) + at, w, size_t(n) * sizeof(float));
      store(e.dtype, n, w, weight);
      return count_zeros(n, weight);
    }
    return zeros;
  }

  // First half of the direction: the moments that every weight has for itself.
  void direct(const Entry& e, const StepConstants<T>& k) {
    T* buffer = static_cast<T*>(e.first) + at;
    if (k.direction != SGD) {
      first_moment(n, g, buffer, k.one_minus_beta1);
      u = buffer;
    } else if (e.first) {
      auto loop = k.nesterov ? (e.fresh ? sgd<T, true, true> : sgd<T, true, false>)
                             : (e.fresh ? sgd<T, false, true> : sgd<T, false, false>);
      loop(n, g, buffer, update_copy, k.momentum, k.undamped);
      u = k.nesterov ? update_copy : buffer;
    }
  }

  // The update of a block whose moments have been advanced before.
  void recall(const Entry& e, const StepConstants<T>& k, int64_t start, int64_t count, bool need_grad = false) {
    const bool from_buffer = e.first && !k.nesterov;
    open(e, k, start, count, need_grad || !from_buffer);
    const T* buffer = static_cast<const T*>(e.first) + at;
    if (from_buffer) {
      u = buffer;
    } else if (e.first) {
      nesterov_update(n, g, buffer, update_copy, k.momentum);
      u = update_copy;
    }
  }
};

// Prefetches the block from `at` on: a block is too short for the hardware to recognize a stream.
inline void prefetch(const void* from, int64_t at, int64_t end, int64_t bytes) {
  const char* p = static_cast<const char*>(from) + at * bytes;
  for (int64_t i = 0; from && i < smaller(end - at, BLOCK) * bytes; i += 64) __builtin_prefetch(p + i);
}

template <class T> void prefetch_block(const Entry& e, int64_t at, int64_t end, bool grads) {
  const int64_t stored = is_half<T>(e) ? 2 : sizeof(T);
  prefetch(e.weight, at, end, stored), prefetch(e.master, at, end, sizeof(T)), prefetch(e.first, at, end, sizeof(T));
  if (grads || !e.first) prefetch(e.grad, at, end, stored);
}

}  // namespace
}  // namespace symopt
