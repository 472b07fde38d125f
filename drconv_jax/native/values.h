// Values: bfloat16, which is stored only, and conversions to and from the type that is computed in.

#pragma once

#include <cstdint>
#include <cstring>

#include "drconv_jax/native/inline.h"

namespace drconv {

struct BFloat16 {
  uint16_t bits;
};

INLINE float Widen(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
INLINE float Widen(float value) { return value; }
INLINE double Widen(double value) { return value; }

INLINE void Narrow(float value, BFloat16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    result->bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
  } else {
    result->bits =
        static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
  }
}
INLINE void Narrow(float value, float* result) { *result = value; }
INLINE void Narrow(double value, double* result) { *result = value; }

}  // namespace drconv
