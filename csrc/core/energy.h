// Exact sums of squares, independent of the order of their terms.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "core/magnitude.h"

namespace dimap {

using u128 = unsigned __int128;

// A non-negative fixed-point number with unit 2^-298, the square of float32's smallest denormal: it holds the energy of
// up to 2^80 float32 weights of any magnitude exactly, so sums do not depend on order, threads or device.
class Energy {
 public:
  static constexpr int kLimbs = 10;  // 64 bits each

  // Adds value · 2^(2·scale - 298); scale in [0, 253].
  void add(u128 value, int scale) {
    const int shift = 2 * scale;
    const int limb = shift / 64, bit = shift % 64;
    const uint64_t low = static_cast<uint64_t>(value), high = static_cast<uint64_t>(value >> 64);
    uint64_t parts[3] = {low << bit, high << bit, 0};
    if (bit) {
      parts[1] |= low >> (64 - bit);
      parts[2] = high >> (64 - bit);
    }
    unsigned carry = 0;
    for (int i = 0; i + limb < kLimbs && (i < 3 || carry); ++i) {
      const u128 sum = static_cast<u128>(limbs_[limb + i]) + (i < 3 ? parts[i] : 0) + carry;
      limbs_[limb + i] = static_cast<uint64_t>(sum);
      carry = static_cast<unsigned>(sum >> 64);
    }
  }

  void add(const Energy& other) {
    unsigned carry = 0;
    for (int i = 0; i < kLimbs; ++i) {
      const u128 sum = static_cast<u128>(limbs_[i]) + other.limbs_[i] + carry;
      limbs_[i] = static_cast<uint64_t>(sum);
      carry = static_cast<unsigned>(sum >> 64);
    }
  }

  // The nearest float64, ties to even.
  double value() const {
    int top = kLimbs - 1;
    while (top >= 0 && limbs_[top] == 0) --top;
    if (top < 0) return 0.0;
    const int width = 64 * top + 64 - std::countl_zero(limbs_[top]);  // bits in the number
    if (width <= 53) return static_cast<double>(limbs_[0]) * power_of_two(-298);
    const int drop = width - 53;  // bits below the 53 kept
    uint64_t kept = bits_from(drop) & ((uint64_t{1} << 53) - 1);
    const bool half = bit(drop - 1);
    bool sticky = false;
    for (int i = 0; i < (drop - 1) / 64 && !sticky; ++i) sticky = limbs_[i] != 0;
    if ((drop - 1) % 64) sticky |= (limbs_[(drop - 1) / 64] << (64 - (drop - 1) % 64)) != 0;
    if (half && (sticky || (kept & 1))) ++kept;
    return static_cast<double>(kept) * power_of_two(drop - 298);
  }

  std::array<uint64_t, kLimbs>& limbs() { return limbs_; }
  const std::array<uint64_t, kLimbs>& limbs() const { return limbs_; }

 private:
  bool bit(int i) const { return limbs_[i / 64] >> (i % 64) & 1; }
  uint64_t bits_from(int i) const {
    const int limb = i / 64, shift = i % 64;
    uint64_t bits = limbs_[limb] >> shift;
    if (shift && limb + 1 < kLimbs) bits |= limbs_[limb + 1] << (64 - shift);
    return bits;
  }

  std::array<uint64_t, kLimbs> limbs_{};
};

// Sums of squares kept apart by exponent: the cheap form inside a kernel, folded into an Energy at its end.
struct ExponentSums {
  std::array<u128, 254> sums{};
  int first = 254, last = -1;  // the touched range

  DIMAP_HD void add(int scale, u128 sum_of_squares) {
    sums[scale] += sum_of_squares;
    first = scale < first ? scale : first;
    last = scale > last ? scale : last;
  }
  DIMAP_HD void add_key(uint32_t key) { add(scale(key), square(key)); }

  void move_to(Energy& energy) {
    for (int i = first; i <= last; ++i) {
      if (sums[i]) energy.add(sums[i], i);
      sums[i] = 0;
    }
    first = 254;
    last = -1;
  }
};

}  // namespace dimap
