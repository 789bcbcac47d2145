// float16 and bfloat16 on the CPU, as 16 bits: rounding to nearest even, and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cuda/sm90/params.h"

namespace treegrpo::test {

inline uint16_t narrow(sm90::Half type, float x) {
  if (type == sm90::Half::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  const float size = std::abs(x);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (!(size < 65520)) return sign | (std::isnan(x) ? 0x7e00 : 0x7c00);
  if (size == 0) return sign;
  const int exponent = std::max(std::ilogb(size), -14);
  return sign + static_cast<uint16_t>((exponent + 14) * 1024 + std::lrint(std::ldexp(size, 10 - exponent)));
}

inline float widen(sm90::Half type, uint16_t x) {
  if (type == sm90::Half::kBFloat16) {
    const uint32_t bits = uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float size = exponent == 31   ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(fraction, -24)
                                     : std::ldexp(1024 + fraction, exponent - 25);
  return x & 0x8000 ? -size : size;
}

}  // namespace treegrpo::test
