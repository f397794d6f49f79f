// The score's arithmetic, for the host and the device: the only copy of it.
//
// A weight's magnitude is handled as a 31-bit integer, its *key*: the bits of |w| as float32. Keys order as magnitudes
// do, bfloat16 and float16 map into them exactly, and integer comparisons are not touched by flush-to-zero modes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DIMAP_HD __host__ __device__ __forceinline__
#else
// Always inlined: translation units for different instruction sets must not share an out-of-line copy.
#define DIMAP_HD inline __attribute__((always_inline))
#endif

namespace dimap {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr uint32_t kNonFinite = 0x7F800000u;  // smallest key that is an infinity or a NaN
constexpr uint32_t kKeyEnd = 0x80000000u;     // one past the largest key

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Keys of a 16-bit type have this many low zero bits (float16: its subnormals have more).
constexpr int granularity(DType dtype) { return dtype == DType::kBFloat16 ? 16 : dtype == DType::kFloat16 ? 13 : 0; }

// The bits of an infinity: those of a finite magnitude are below.
DIMAP_HD constexpr uint32_t infinity_bits(DType dtype) {
  return dtype == DType::kFloat32 ? kNonFinite : dtype == DType::kBFloat16 ? 0x7F80u : 0x7C00u;
}

template <DType kType>
struct Storage;
template <>
struct Storage<DType::kFloat32> {
  using type = uint32_t;
};
template <>
struct Storage<DType::kBFloat16> {
  using type = uint16_t;
};
template <>
struct Storage<DType::kFloat16> {
  using type = uint16_t;
};
template <DType kType>
using storage_t = typename Storage<kType>::type;

// float16 bits (sign cleared) -> key. All intermediate floats are normal: exact even when denormals are flushed.
DIMAP_HD uint32_t key_of_half(uint32_t half) {
  const uint32_t shifted = half << 13;
  if (half >= 0x7C00u) return shifted + (uint32_t{255 - 31} << 23);
  if (half >= 0x0400u) return shifted + (uint32_t{127 - 15} << 23);
  const uint32_t biased = shifted + (uint32_t{113} << 23);
  const uint32_t bias = uint32_t{113} << 23;
  float a, b;
  memcpy(&a, &biased, 4);
  memcpy(&b, &bias, 4);
  a -= b;
  uint32_t key;
  memcpy(&key, &a, 4);
  return key;
}

template <DType kType>
DIMAP_HD uint32_t key_of(storage_t<kType> bits) {
  if constexpr (kType == DType::kFloat32) return bits & 0x7FFFFFFFu;
  if constexpr (kType == DType::kBFloat16) return (uint32_t{bits} & 0x7FFFu) << 16;
  if constexpr (kType == DType::kFloat16) return key_of_half(uint32_t{bits} & 0x7FFFu);
}

// w = significand(key) · 2^(scale(key) - 149), with significand < 2^24 and scale in [0, 253].
DIMAP_HD uint32_t significand(uint32_t key) { return (key & 0x7FFFFFu) | (key >> 23 ? 0x800000u : 0u); }
DIMAP_HD int scale(uint32_t key) {
  const int exponent = static_cast<int>(key >> 23);
  return exponent ? exponent - 1 : 0;
}

// significand², an integer below 2^48: the weight's energy in units of 2^(2·scale - 298).
DIMAP_HD uint64_t square(uint32_t key) {
  const uint64_t m = significand(key);
  return m * m;
}

// float64 and its bits. Those of numbers that are not negative order as the numbers do.
DIMAP_HD uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}
DIMAP_HD double double_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// 2^e as float64, e in [-1022, 1023].
DIMAP_HD double power_of_two(int e) { return double_of(static_cast<uint64_t>(e + 1023) << 52); }

// w² as float64: exact, since it has at most 48 significant bits.
DIMAP_HD double squared_value(uint32_t key) {
  return static_cast<double>(square(key)) * power_of_two(2 * scale(key) - 298);
}

// The score (Eq. 10 of the DIMAP paper; LAMP's per-weight score): w² over the energy of all weights of its layer that
// are at least as large. `energy` is S(w), already rounded once to float64. Zero weights score 0.
DIMAP_HD double score64(uint32_t key, double energy) { return key == 0 ? 0.0 : squared_value(key) / energy; }

// Bounds of scores come from float64 running sums; their relative error is far below this. Exact sums are for the few
// weights that the bounds cannot part.
constexpr double kBoundSlack = 1e-9;

// Of a weight with this key: the energy of those above it is at least `energy_above`.
DIMAP_HD double upper_bound(uint32_t key, double energy_above) {
  if (key == 0) return 0.0;
  const double square = squared_value(key);
  const double bound = square / (energy_above + square) * (1 + kBoundSlack);
  return bound < 1.0 ? bound : 1.0;
}
// ... of those that are at least as large, itself among them, at most `energy`.
DIMAP_HD double lower_bound(uint32_t key, double energy) {
  return key == 0 || energy == 0.0 ? 0.0 : squared_value(key) / energy * (1 - kBoundSlack);
}

}  // namespace dimap
