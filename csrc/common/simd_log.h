// Natural logarithms for loops that GCC vectorises (see simd.h).
#pragma once

#include "common/simd.h"

namespace ltood {

// x = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by the series of atanh:
// 2 s + s z (2/3 + 2/5 z + 2/7 z^2 + ...), z = s^2 <= 0.0295. The error stays relative near x = 1, where m - 1 is
// exact. For normal x > 0; NaN and infinity give NaN.

// Cut after 2/9 z^3: 2e-9 relative; with the rounding of the steps 2e-7.
LTOOD_INLINE float log_simd(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t exponent = (bits - 0x3F3504F3u) & 0xFF800000u;  // k << 23
  const float m = bit_cast<float>(bits - exponent);
  // k + 1.5 * 2^23 lies in the low bits of a float near 1.5 * 2^23: again no conversion.
  const float k =
      bit_cast<float>(0x4B400000u + static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 23)) - 12582912.0f;
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  float p = 0.22222222f;
  p = p * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  return k * 0.69314718f + (2.0f * s + s * z * p) + (x - x);
}

// Cut after 2/23 z^10: 1e-18 relative; with the rounding of the steps 4e-16.
LTOOD_INLINE double log_simd(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t exponent = (bits - 0x3FE6A09E667F3BCDu) & 0xFFF0000000000000u;
  const double m = bit_cast<double>(bits - exponent);
  // The bias of 2048 keeps the shift logical: AVX2 has no arithmetic shift of 64 bits.
  const uint64_t biased = (exponent + 0x8000000000000000u) >> 52;
  const double k = bit_cast<double>(0x4338000000000000u + biased) - 6755399441057792.0;
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 2.0 / 23;
  p = p * z + 2.0 / 21;
  p = p * z + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  return k * kLn2 + (2.0 * s + s * z * p) + (x - x);
}

// log(1 + e) for e in [0, 1] is 2 atanh(s), s = e / (2 + e) <= 1/3, by the series 2 s (1 + z/3 + z^2/5 + ...), z = s^2:
// its error stays relative as e vanishes. The first term left out is 1e-9 (float) and 1e-17 (double) of the sum.
LTOOD_INLINE float log1p_simd(float e) {
  const float s = e / (2.0f + e), z = s * s;
  float p = 1.0f / 17;
  p = p * z + 1.0f / 15;
  p = p * z + 1.0f / 13;
  p = p * z + 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  return 2.0f * (s + s * z * p);
}

LTOOD_INLINE double log1p_simd(double e) {
  const double s = e / (2.0 + e), z = s * s;
  double p = 1.0 / 33;
  for (int k = 31; k >= 3; k -= 2) p = p * z + 1.0 / k;
  return 2.0 * (s + s * z * p);
}

}  // namespace ltood
