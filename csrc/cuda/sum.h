// Exact sums of squares on the device: dimap::Energy of core/energy.h without the standard library.
#pragma once

#include <cstdint>

#include "core/magnitude.h"

namespace dimap::cuda {

namespace solver {

// Exact sums, unit 2^-298; dimap::Energy for the device.
struct Sum {
  static constexpr int kLimbs = 10;
  uint64_t limb[kLimbs];

  DIMAP_HD void clear() {
    for (int i = 0; i < kLimbs; ++i) limb[i] = 0;
  }
  // Adds (low + high · 2^64) · 2^bit.
  DIMAP_HD void add(uint64_t low, uint64_t high, int bit) {
    const int first = bit / 64, shift = bit % 64;
    const uint64_t parts[3] = {low << shift, shift ? high << shift | low >> (64 - shift) : high,
                               shift ? high >> (64 - shift) : 0};
    uint64_t carry = 0;
    for (int i = 0; i + first < kLimbs && (i < 3 || carry); ++i) {
      const uint64_t part = i < 3 ? parts[i] : 0;
      uint64_t& to = limb[first + i];
      to += part;
      uint64_t out = to < part;
      to += carry;
      out += to < carry;
      carry = out;
    }
  }
  DIMAP_HD bool bit(int i) const { return limb[i / 64] >> (i % 64) & 1; }
  // The nearest float64, ties to even.
  DIMAP_HD double value() const {
    int top = kLimbs - 1;
    while (top >= 0 && limb[top] == 0) --top;
    if (top < 0) return 0.0;
    int width = 64 * top;
    for (uint64_t v = limb[top]; v; v >>= 1) ++width;
    if (width <= 53) return static_cast<double>(limb[0]) * power_of_two(-298);
    const int drop = width - 53, from = drop / 64, shift = drop % 64;
    uint64_t kept = limb[from] >> shift;
    if (shift && from + 1 < kLimbs) kept |= limb[from + 1] << (64 - shift);
    kept &= (uint64_t{1} << 53) - 1;
    const int below = drop - 1;  // the bit that says half
    bool sticky = false;
    for (int i = 0; i < below / 64; ++i) sticky |= limb[i] != 0;
    if (below % 64) sticky |= limb[below / 64] << (64 - below % 64) != 0;
    if (bit(below) && (sticky || (kept & 1))) ++kept;
    return static_cast<double>(kept) * power_of_two(drop - 298);
  }
};

}  // namespace solver

}  // namespace dimap::cuda
