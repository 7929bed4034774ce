// Loops that GCC vectorises, compiled once per instruction set and chosen at run time.
//
// LTOOD_CLONES marks an ordinary function (not a template): the loader picks AVX-512, AVX2+FMA or the baseline, up to
// the set that LTOOD_CPU_ISA named when setup.py ran (2, 1 or 0).
// What such a function calls must be LTOOD_INLINE, so that it is compiled again inside each clone. The sets differ in
// rounding (lanes of a sum, fused multiply-add), never beyond the tolerances; one machine always gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef LTOOD_CPU_ISA
#define LTOOD_CPU_ISA 2
#endif

// Function multi-versioning resolves symbols before a sanitizer's run time is up: sanitizer builds do without it. So do
// old Clangs, whose resolver compares the processor's model instead of its features (14 runs AVX-512 everywhere; 19 is
// right), and systems without ELF's indirect functions.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__) && (!defined(__clang__) || __clang_major__ >= 19)
#define LTOOD_CLONES_UP_TO LTOOD_CPU_ISA
#else
#define LTOOD_CLONES_UP_TO 0
#if defined(__x86_64__) && defined(__clang__) && __clang_major__ < 19
#warning "loops are compiled for SSE2 alone: AVX2 and AVX-512 need GCC, or Clang 19 or later"
#endif
#endif

#if LTOOD_CLONES_UP_TO == 2
#define LTOOD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif LTOOD_CLONES_UP_TO == 1
#define LTOOD_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define LTOOD_CLONES
#endif

#define LTOOD_INLINE inline __attribute__((always_inline))

namespace ltood {

// The instruction set of the clones that run on this processor.
inline const char* cpu_isa() {
#if LTOOD_CLONES_UP_TO >= 1
  __builtin_cpu_init();
#if LTOOD_CLONES_UP_TO == 2
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
#endif
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "baseline";
}

template <typename To, typename From>
LTOOD_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 2^y = 2^n * 2^r with n = round(y), |r| <= 1/2. Adding 1.5 * 2^mantissa rounds y to an integer and leaves n in the low
// bits, from where a shift makes it an exponent; no conversion, so NaN stays NaN and nothing is undefined.
// 2^r is the relative minimax polynomial on [-1/2, 1/2] (Remez). Below 2^-126.5 (2^-1022.5) the result is 0,
// from 2^127.5 (2^1023.5) on it is infinity.

// Degree 6, error of the polynomial 1.9e-9; with the rounding of the steps 1.5e-7 relative (2.5 half units).
LTOOD_INLINE float exp2_simd(float y) {
  y = y < -127.0f ? -127.0f : y;
  y = y > 128.0f ? 128.0f : y;
  const float shifted = y + 12582912.0f;
  const float r = y - (shifted - 12582912.0f);
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
  float p = 0.00015345812f;
  p = p * r + 0.0013399931f;
  p = p * r + 0.0096184890f;
  p = p * r + 0.055503288f;
  p = p * r + 0.24022647f;
  p = p * r + 0.69314721f;
  p = p * r + 1.0f;
  return p * scale;
}

// Degree 11, error of the polynomial 3.1e-18; with the rounding of the steps 2.8e-16 relative (2.5 half units).
LTOOD_INLINE double exp2_simd(double y) {
  y = y < -1023.0 ? -1023.0 : y;
  y = y > 1024.0 ? 1024.0 : y;
  const double shifted = y + 6755399441055744.0;
  const double r = y - (shifted - 6755399441055744.0);
  const double scale = bit_cast<double>((bit_cast<uint64_t>(shifted) << 52) + 0x3FF0000000000000u);
  double p = 4.4352809446103361611e-10;
  p = p * r + 7.0741056262456593708e-9;
  p = p * r + 1.0178198033328527662e-7;
  p = p * r + 1.3215433089594629037e-6;
  p = p * r + 0.0000152527334899608046;
  p = p * r + 0.00015403530462514613026;
  p = p * r + 0.0013333558146789950323;
  p = p * r + 0.0096181291075883350833;
  p = p * r + 0.055504108664819921483;
  p = p * r + 0.24022650695910156205;
  p = p * r + 0.69314718055994533046;
  p = p * r + 1.0;
  return p * scale;
}

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// |s| up to here needs no shift: N exp(s) and exp(-s) stay inside the type's normal range for N < 2^36 (float:
// e^60 = 1.1e26), and so does the product of two such factors that the backward forms, exp(s) * exp(-lse) <= 1.
template <typename T>
constexpr double safe_exponent() {
  return sizeof(T) == 4 ? 60.0 : 600.0;
}

}  // namespace ltood
