// The one loop that reads weights: decide what is certain, sum what is kept, set aside the rest.
//
// Everything else is built on it: with an empty bracket it emits a mask for a known cut, without a mask it surveys.
#pragma once

#include <cstdint>

#include "core/energy.h"
#include "cpu/isa/rows.h"

namespace dimap::cpu {

// Weights with key >= high are kept, those below low are dropped, those between are set aside; but weights equal to
// `atom`, which is below high, are only counted: they are many, and their positions are not needed yet.
struct Bracket {
  static constexpr uint32_t kNoAtom = 0xFFFFFFFFu;
  uint32_t low = kKeyEnd;
  uint32_t high = kKeyEnd;
  uint32_t atom = kNoAtom;
  // Of those set aside, the mask keeps the ones from here on until more is known: where this is close to the cut few
  // bytes of the mask need a second visit. Neither summed nor counted as kept.
  uint32_t guess = kKeyEnd;
};

// Kept weights are summed as integers q = significand << (scale - grid), q < 2^31, on the grid of the bracket's high
// end, so that four squares fit 64 bits; the few that are larger than the grid reaches go one by one into `outliers`.
struct Grid {
  DIMAP_HD explicit Grid(uint32_t high)
      : exponent(high >> 23 ? high >> 23 : 1),
        implicit(high >> 23 ? 0x800000u : 0u),
        limit(high >> 23 ? (exponent + 8 < 255 ? (exponent + 8) << 23 : kNonFinite) : 0x800000u) {}
  uint32_t exponent;  // of one unit, biased; scale = exponent - 1
  uint32_t implicit;  // the hidden bit; none where the bracket's high end is denormal
  uint32_t limit;     // first key the grid does not hold
};

struct Decided {
  uint32_t* keys = nullptr;       // set aside: key and
  uint16_t* positions = nullptr;  // index of the weight in this call; both with room for n + kSlack
  int64_t aside = 0;              // how many
  int64_t kept = 0;
  int64_t atoms = 0;
  bool non_finite = false;  // an infinity or a NaN was seen
  // Over the kept ones on the grid, q² taken alone or up to four together: the sum modulo 2^64, and the sum of the
  // upper halves. Both together give the sum exactly for up to 2^32 weights.
  uint64_t squares = 0, squares_high = 0;
  ExponentSums* outliers = nullptr;  // null: what is beyond the grid is not summed

  bool stream = false;  // write the mask past the caches: it will not be read soon

  static constexpr int64_t kSlack = 64;

  u128 grid_sum() const {
    const uint64_t low = squares - (squares_high << 32);  // the sum of the lower halves: below 2^64
    return (static_cast<u128>(squares_high) << 32) + low;
  }
};

// weights: [n]; mask: [n] bytes, 1 where kept or guessed so and 0 elsewhere, or null. n <= 65,536.
using DecideFn = void (*)(const void* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out);

// ... for a bracket that leaves nothing to set aside.
DIMAP_HD Decided decide_from(DecideFn decide, const void* weights, int64_t n, const Bracket& bracket,
                             uint8_t* mask = nullptr, ExponentSums* outliers = nullptr) {
  uint32_t keys[Decided::kSlack];
  uint16_t positions[Decided::kSlack];
  Decided out;
  out.keys = keys, out.positions = positions, out.outliers = outliers;
  decide(weights, n, bracket, mask, out);
  out.keys = nullptr, out.positions = nullptr;
  return out;
}

// Zeroes the weights with key < keep_from, but for those equal to `tie`.
using ZeroFn = void (*)(void* weights, int64_t n, uint32_t keep_from, uint32_t tie);

// Marks the n largest magnitudes of every group of m weights, of equal ones the first. weights: [blocks, m, inner], the
// weights of a group `inner` apart; mask: bytes of the same shape, 1 where marked and 0 elsewhere; m in [2, 16].
// Returns the bits of the largest magnitude of all: of those that are finite nothing is larger.
using MarkFn = uint32_t (*)(const void* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask);
constexpr int kMostInGroup = 16;

struct Kernels {
  const char* name;
  DecideFn decide[3];  // by DType
  ZeroFn zero[3];
  ScoreRowsFn score_rows;
  MarkFn mark[3];
};

extern const Kernels kPortable;
#if defined(DIMAP_X86)
uint32_t mark_words_avx2(const void* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask);
uint32_t mark_shorts_avx2(const void* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask);
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The instruction sets that this processor has, best last; the one in use. DIMAP_ISA=portable|avx2|avx512 forces one.
int available_kernels(const Kernels* out[3]);
const Kernels& kernels();

}  // namespace dimap::cpu
