// The loops in plain C++: the specification of the other instruction sets, and their tail.
//
// Each instruction set compiles its own copy with its own flags, so everything here has internal linkage: the linker
// must never give the portable build a copy made for another processor.
#pragma once

#include "cpu/isa/decide.h"

namespace dimap::cpu {
namespace {

// Sums one weight that is kept, and notes one that is not finite.
inline void sum_up(uint32_t key, const Grid& grid, Decided& out) {
  if (key >= kNonFinite) {
    out.non_finite = true;
  } else if (key >= grid.limit) {
    if (out.outliers) out.outliers->add_key(key);
  } else {
    const uint32_t exponent = key >> 23;
    const uint64_t q = uint64_t{(key & 0x7FFFFFu) | grid.implicit}
                       << (exponent > grid.exponent ? exponent - grid.exponent : 0);
    out.squares += q * q;
    out.squares_high += q * q >> 32;
  }
}

// Decides weights [first, n). `position` of the weight i is i.
template <DType kType>
inline void decide_range(const storage_t<kType>* weights, int64_t first, int64_t n, const Bracket& bracket,
                         const Grid& grid, uint8_t* mask, Decided& out) {
  const uint32_t low = bracket.low, high = bracket.high, atom = bracket.atom;
  const uint32_t marked = bracket.guess < high ? bracket.guess : high;
  const uint32_t summed = high < kNonFinite ? high : kNonFinite;
  int64_t aside = out.aside, kept = 0, atoms = 0;
  for (int64_t i = first; i < n; ++i) {
    const uint32_t key = key_of<kType>(weights[i]);
    const bool is_atom = key == atom;
    atoms += is_atom;
    kept += key >= high;
    if (mask) mask[i] = key >= marked && !is_atom;
    out.keys[aside] = key;
    out.positions[aside] = static_cast<uint16_t>(i);
    aside += key >= low && key < high && !is_atom;
    if (key >= summed) sum_up(key, grid, out);
  }
  out.aside = aside;
  out.kept += kept;
  out.atoms += atoms;
}

// Sets aside the weights of a line, which begins at `first`, whose bits are set. Mostly they are few, and whether there
// is one is not to be foretold: the first two are written without a branch, and what is not there is overwritten by the
// next. Returns how many numbers are now set aside.
template <typename Bits, typename KeyAt>
DIMAP_HD int64_t set_aside(Bits bits, int64_t first, KeyAt&& key_at, uint32_t* keys, uint16_t* positions,
                           int64_t aside) {
  const int64_t end = aside + __builtin_popcountll(bits);
  constexpr Bits kLast = Bits{1} << (8 * sizeof(Bits) - 1);  // so that there always is a first
  const auto put = [&](int64_t to) {
    const int64_t at = first + __builtin_ctzll(bits | kLast);
    keys[to] = key_at(at);
    positions[to] = static_cast<uint16_t>(at);
    bits &= bits - 1;
  };
  put(aside);
  put(aside + 1);
  for (int64_t to = aside + 2; to < end; ++to) [[unlikely]]
    put(to);
  return end;
}

// The smallest bits (sign cleared) of the storage type whose key is at least `key`: keys rise with the bits.
template <DType kType>
inline uint32_t bits_from(uint32_t key) {
  if constexpr (kType == DType::kFloat32) return key < kKeyEnd ? key : kKeyEnd;
  if constexpr (kType == DType::kBFloat16) return key < kKeyEnd ? (key + 0xFFFFu) >> 16 : 0x8000;
  constexpr uint32_t kNormal = 113u << 23, kMost = 142u << 23;  // the smallest; all up to here are in steps of 2^13
  if (key >= kNormal && key <= kMost) return ((key - kNormal + 0x1FFFu) >> 13) + 0x400;
  uint32_t no = 0, yes = 0x8000;
  while (no < yes) {
    const uint32_t middle = (no + yes) / 2;
    if (key_of<kType>(static_cast<storage_t<kType>>(middle)) >= key)
      yes = middle;
    else
      no = middle + 1;
  }
  return yes;
}

// A 16-bit type on lanes of 16 bits: magnitudes order as their bits do, and q = significand << shift has so few bits
// that the squares of a pair of lanes are summed in 32.
template <DType kType>
struct Half {
  static constexpr bool kBrain = kType == DType::kBFloat16;
  static constexpr int kFraction = kBrain ? 7 : 10;
  static constexpr uint32_t kInfinity = kBrain ? 0x7F80 : 0x7C00;
  static constexpr uint32_t kNone = 0x8000;            // more than any magnitude
  static constexpr uint32_t kBias = kBrain ? 0 : 112;  // between the exponents of a key and of the type
  static constexpr int kShifts = kBrain ? 5 : 4;       // q has at most 13 or 15 bits,
  static constexpr int kPairs = kBrain ? 32 : 2;       // so that so many sums of pairs fit an unsigned lane

  explicit Half(const Bracket& bracket)
      : low(bits_from<kType>(bracket.low)),
        high(bits_from<kType>(bracket.high)),
        mark(bits_from<kType>(bracket.guess < bracket.high ? bracket.guess : bracket.high)),
        atom(kNone) {
    low = low < high ? low : high;  // then nothing is inside
    const Grid grid(bracket.high);
    exponent = grid.exponent > kBias ? grid.exponent - kBias : 1;
    unit = 23 - kFraction + static_cast<int>(exponent + kBias - grid.exponent);
    limit = (exponent + kShifts + 1) << kFraction;
    const uint32_t beyond = bits_from<kType>(grid.limit);  // an infinity's at most
    limit = limit < beyond ? limit : beyond;
    // An atom may lie between two magnitudes of the type, since a mean was taken for it: then no weight is it.
    if (bracket.atom >= kKeyEnd) return;
    const uint32_t bits = bits_from<kType>(bracket.atom);
    if (bits < kNone && key_of<kType>(static_cast<uint16_t>(bits)) == bracket.atom) atom = bits;
  }

  // Adds a sum of q² to those on a float32's grid.
  void add(u128 sum, Decided& out) const {
    if (sum == 0) return;  // as it is where the grid lies so far below the type that no shift would do
    sum <<= 2 * unit;
    out.squares += static_cast<uint64_t>(sum);
    out.squares_high += static_cast<uint64_t>(sum >> 32);
  }

  uint32_t low, high, mark, atom;  // as the bracket's, in the type's bits
  uint32_t exponent;               // of one unit, biased as the type's; 1 where it is subnormal
  uint32_t limit;                  // from here on q has too many bits: these are summed one by one
  int unit;                        // log2 of the unit over that of a float32's grid
};

template <DType kType>
inline void zero_range(storage_t<kType>* weights, int64_t n, uint32_t keep_from, uint32_t tie) {
  using T = storage_t<kType>;
  constexpr T kMagnitude = kType == DType::kFloat32 ? T(0x7FFFFFFFu) : T(0x7FFFu);
  const uint32_t from = bits_from<kType>(keep_from);
  if (tie == 0xFFFFFFFFu) {
    for (int64_t i = 0; i < n; ++i) {
      const T w = weights[i];
      weights[i] = T(w & kMagnitude) >= from ? w : T{0};
    }
    return;
  }
  const T spared = static_cast<T>(bits_from<kType>(tie));  // the tie is some weight's key
  for (int64_t i = 0; i < n; ++i) {
    const T w = weights[i], m = T(w & kMagnitude);
    weights[i] = m >= from || m == spared ? w : T{0};
  }
}

}  // namespace
}  // namespace dimap::cpu
