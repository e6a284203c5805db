// Vector arithmetic for the CPU ops: vectors that fill one register of the processor for which the code is compiled, and the transcendental
// functions that the ops need. The accuracy is stated at each function. For double, the functions of libm are used.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace simd {

// Number of lanes of a float vector, which is that of one register. g++ keeps wider vectors in memory and processes them lane by lane, which
// is ten times as slow as plain torch.
#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr bool kManyRegisters = true;  // 32 vector registers instead of 16; this limits the size of a block of sums
#else
inline constexpr bool kManyRegisters = false;
#endif
typedef float vfloat __attribute__((vector_size(kWidth * sizeof(float)), aligned(4)));
typedef int32_t vint __attribute__((vector_size(kWidth * sizeof(int32_t)), aligned(4)));
// Type of vectors in memory. It is used instead of memcpy, which g++ compiles to a copy through the stack.
typedef float vmemory __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline vfloat broadcast(float x) { return x - vfloat{}; }
inline vfloat load(const float* p) { return *reinterpret_cast<const vmemory*>(p); }
inline void store(float* p, vfloat v) { *reinterpret_cast<vmemory*>(p) = v; }
inline vfloat load_first(const float* p, int n) { vfloat v{}; std::memcpy(&v, p, n * sizeof(float)); return v; }
inline void store_first(float* p, vfloat v, int n) { std::memcpy(p, &v, n * sizeof(float)); }
inline vfloat max(vfloat a, vfloat b) { return a < b ? b : a; }  // NaN if a is NaN
inline vfloat min(vfloat a, vfloat b) { return b < a ? b : a; }
// Interleave the lanes of two vectors, beginning with lane `first`: a[first], b[first], a[first + 1], ...
template <int first, int... i> inline vfloat interleaved(vfloat a, vfloat b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i % 2 * kWidth + first + i / 2)...);
}
template <int first> inline vfloat interleaved(vfloat a, vfloat b) { return interleaved<first>(a, b, std::make_integer_sequence<int, kWidth>()); }
inline float sum(vfloat v) {
  float parts[kWidth];
  store(parts, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// Return exp(x), with a relative error below 3e-7 for -87 < x < 88. Values of x outside of this range are clamped to it.
inline vfloat exp(vfloat x) {
  x = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
  const vfloat shifted = x * 1.44269504f + 12582912.0f;  // rounds x/ln2 to the nearest integer in the low mantissa bits
  const vfloat n = shifted - 12582912.0f;
  const vfloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * reinterpret_cast<vfloat>((reinterpret_cast<vint>(shifted) - 0x4B400000 + 127) << 23);
}

// Return log(u) for normal u > 0, with an absolute error below 1e-7 max(1, |log u|). The result is NaN for NaN and infinity.
inline vfloat log(vfloat u) {
  const vint bits = reinterpret_cast<vint>(u), exponent = (bits - 0x3F3504F3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const vfloat f = reinterpret_cast<vfloat>(bits - (exponent << 23)) - 1.0f;
  vfloat p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vfloat square = f * f;
  const vfloat e = __builtin_convertvector(exponent, vfloat);
  return f + (square * (p * f - 0.5f) + e * 0.693147181f) + (u - u);
}

// Return log(1 + t) for 0 <= t <= 1, with an absolute error below 2e-7, by a Chebyshev interpolant of log(1 + t) / t.
inline vfloat log1p_unit(vfloat t) {
  vfloat p = t * 0.0051261019f - 0.0290740654f;
  p = p * t + 0.0775160864f;
  p = p * t - 0.136022478f;
  p = p * t + 0.190768808f;
  p = p * t - 0.248353988f;
  p = p * t + 0.333181202f;
  p = p * t - 0.499994457f;
  p = p * t + 0.99999994f;
  return p * t;
}

// softplus(h) = log(1 + exp(h)), absolute error below 3e-7 max(1, h).
inline vfloat softplus(vfloat h) { return max(h, vfloat{}) + log1p_unit(exp(h > 0.0f ? -h : h)); }

// 1 / (1 + exp(-h)), absolute error below 2e-7.
inline vfloat sigmoid(vfloat h) { return 1.0f / (1.0f + exp(-h)); }

inline double log1p_unit(double t) { return std::log1p(t); }
inline double softplus(double h) { return std::fmax(h, 0.0) + std::log1p(std::exp(-std::fabs(h))); }
inline double sigmoid(double h) { return 1.0 / (1.0 + std::exp(-h)); }

// Vector type with which the ops compute: a vector of floats for float, a single number for double.
template <typename T> struct Pack;
template <> struct Pack<float> {
  static constexpr int width = kWidth;
  using type = vfloat;
  using index = vint;
  static type load(const float* p) { return simd::load(p); }
  static type load_first(const float* p, int n) { return simd::load_first(p, n); }
  static void store(float* p, type v) { simd::store(p, v); }
  static void store_first(float* p, type v, int n) { simd::store_first(p, v, n); }
  static type exp(type x) { return simd::exp(x); }
  static type log(type u) { return simd::log(u); }
  static float sum(type v) { return simd::sum(v); }
};
template <> struct Pack<double> {
  static constexpr int width = 1;
  using type = double;
  using index = int64_t;
  static type load(const double* p) { return *p; }
  static type load_first(const double* p, int) { return *p; }
  static void store(double* p, type v) { *p = v; }
  static void store_first(double* p, type v, int) { *p = v; }
  static type exp(type x) { return std::exp(x); }
  static type log(type u) { return std::log(u); }
  static double sum(type v) { return v; }
};

}  // namespace simd
