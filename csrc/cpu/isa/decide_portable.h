// The loops in plain C++: the specification of the other instruction sets, and their tail.
//
// Each instruction set compiles its own copy with its own flags, so everything here has internal linkage: the linker
// must never give the portable build a copy made for another processor.
#pragma once

#include "cpu/isa/decide.h"

namespace dimap::cpu {
namespace {

// Decides weights [first, n). `position` of the weight i is i.
template <DType kType>
inline void decide_range(const storage_t<kType>* weights, int64_t first, int64_t n, const Bracket& bracket,
                         const Grid& grid, uint8_t* mask, Decided& out) {
  const uint32_t low = bracket.low, high = bracket.high, atom = bracket.atom;
  const uint32_t marked = bracket.guess < high ? bracket.guess : high;
  int64_t aside = out.aside, kept = 0, atoms = 0;
  uint32_t largest = out.largest;
  uint64_t squares = 0, squares_high = 0;
  for (int64_t i = first; i < n; ++i) {
    const uint32_t key = key_of<kType>(weights[i]);
    const bool is_atom = key == atom;
    const bool keep = key >= high;
    const bool set_aside = key >= low && key < high && !is_atom;
    largest = key > largest ? key : largest;
    atoms += is_atom;
    kept += keep;
    if (mask) mask[i] = key >= marked && !is_atom;
    out.keys[aside] = key;
    out.positions[aside] = static_cast<uint16_t>(i);
    aside += set_aside;
    if (keep) {
      if (key >= grid.limit) {
        if (key < kNonFinite && out.outliers) out.outliers->add_key(key);
      } else {
        const uint32_t exponent = key >> 23;
        const uint64_t q = uint64_t{(key & 0x7FFFFFu) | grid.implicit}
                           << (exponent > grid.exponent ? exponent - grid.exponent : 0);
        squares += q * q;
        squares_high += q * q >> 32;
      }
    }
  }
  out.aside = aside;
  out.kept += kept;
  out.atoms += atoms;
  out.largest = largest;
  out.squares += squares;
  out.squares_high += squares_high;
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
