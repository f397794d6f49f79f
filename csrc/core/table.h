// What a survey of the weights yields: small additive integer tables, one for each layer.
//
// A survey looks at each layer through a *window* of magnitude keys cut into equal bins. The weights above the window
// are summed as one, each bin has a count and an energy, and the weights below it are what is left of the layer's
// total. Every field is an integer: adding two surveys taken through the same windows is the survey of the union.
#pragma once

#include <cstdint>
#include <span>

#include "core/energy.h"

namespace dimap {

// Bins [base + b·2^shift, base + (b+1)·2^shift). base is a multiple of 2^shift and shift <= 23, so the keys of a bin
// share one exponent and their squares one unit.
//
// A window also carries what earlier surveys showed of the weights beside it: those below have keys below below_end and
// score at most below_high, those above have keys from above_first on and score at least above_low. So closing in on
// one part never loses what is known of the others, and every round knows more than the one before.
struct Window {
  uint32_t base = 0;
  int shift = 23;
  uint32_t below_end = kKeyEnd;
  uint32_t above_first = 0;
  double below_high = 1.0;
  double above_low = 0.0;

  uint64_t end(int64_t bins) const { return base + (static_cast<uint64_t>(bins) << shift); }
  bool operator==(const Window&) const = default;
};

constexpr int kMinBins = 256;  // enough for one window over all keys at shift 23

// The narrowest window of `bins` bins over the keys [first, last], with bins no finer than `granularity`.
inline Window window_over(uint32_t first, uint32_t last, int64_t bins, int granularity) {
  for (int shift = granularity; shift < 23; ++shift) {
    const Window window{first & ~((uint32_t{1} << shift) - 1), shift};
    if (window.end(bins) > last) return window;
  }
  return Window{first & ~((uint32_t{1} << 23) - 1), 23};
}

// The energy of a bin is (low + high · 2^24) · 2^(2·scale - 298): two words, so that 2^39 weights cannot overflow them.
struct Bin {
  int64_t count = 0;
  uint64_t low = 0;
  uint64_t high = 0;

  void add(uint32_t key) {
    const uint64_t s = square(key);
    ++count;
    low += s & 0xFFFFFFu;
    high += s >> 24;
  }
  void add(uint32_t key, int64_t weights) {
    const uint64_t s = square(key), n = static_cast<uint64_t>(weights);
    count += weights;
    low += (s & 0xFFFFFFu) * n;
    high += (s >> 24) * n;
  }
  u128 sum() const { return (static_cast<u128>(high) << 24) + low; }
};
static_assert(sizeof(Bin) == 24);

struct LayerTable {
  Window window;
  int granularity = 0;  // low zero bits of every key in the layer
  int64_t total = 0;    // weights in the layer
  int64_t above = 0;    // weights above the window, none with a key below
  uint32_t above_first = kNonFinite;
  Energy above_energy;
  uint32_t below_end = 0;  // weights below the window have smaller keys than this
  std::span<const Bin> bins;

  // Sets the window and what it says of the weights outside: all keys from `first_above` on are above it, and all below
  // `end_below` below it.
  void look_through(const Window& w, uint64_t first_above, uint32_t end_below) {
    window = w;
    const auto first = static_cast<uint32_t>(first_above < kNonFinite ? first_above : kNonFinite);
    above_first = first > w.above_first ? first : w.above_first;
    below_end = end_below < w.below_end ? end_below : w.below_end;
  }
};

}  // namespace dimap
