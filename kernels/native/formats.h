// Half-precision numbers as bits: to and from float.

#pragma once

#include <cstdint>

namespace symopt {
namespace {

struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

template <class To, class From> inline To cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(Bfloat h) { return cast<float>(uint32_t(h.bits) << 16); }

inline void round_to(Bfloat& h, float x) {  // to nearest, ties to even
  uint32_t bits = cast<uint32_t>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  h.bits = uint16_t(x != x ? 0x7fc0 : rounded >> 16);
}

inline float widen(Half h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  float x = rest >= 0x7c00 ? cast<float>((rest << 13) + 0x70000000u) : cast<float>(rest << 13) * 0x1p112f;
  return cast<float>(cast<uint32_t>(x) | sign);
}

inline void round_to(Half& h, float x) {
  uint32_t bits = cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff, out;
  if (rest > 0x7f800000) out = 0x7e00;
  else if (rest >= 0x477ff000) out = 0x7c00;  // 65520 and above
  else if (rest < 0x38800000)                 // below 2^-14: adding 1/2 leaves the rounded subnormal in the last bits
    out = cast<uint32_t>(cast<float>(rest) + 0.5f) - cast<uint32_t>(0.5f);
  else out = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  h.bits = uint16_t(sign | out);
}

}  // namespace
}  // namespace symopt
