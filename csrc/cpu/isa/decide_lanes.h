// The deciding loop for vectors of 16 or 32 bytes, in the compiler's own vector types: 32 weights a step, a mask of
// lanes in place of every branch. `Lanes` is what those types cannot say, in the words of one instruction set:
//
//   kBytes                        of a vector
//   Bytes narrow(Words x 4), narrow(Shorts x 2)   lanes that are all ones or zeros, made as narrow as bytes
//   uint32_t bits(Bytes)          one bit for each such lane
//   Longs squares(Words)          of the lower half of each long
//   Words pairs(Shorts q)         sums of two squares, all of which are summed once
//   Shorts shifted(Shorts m, Shorts by)           m << by, by at most 5
//   void stream(uint8_t*, Bytes)  a store past the caches, where there is one
//   void fence()                  orders such stores before what follows
#pragma once

#include <cstring>

#include "cpu/isa/decide_portable.h"

namespace dimap::cpu {
namespace {

template <int kBytes>
struct Vectors {
  using Bytes [[gnu::vector_size(kBytes)]] = uint8_t;
  using Shorts [[gnu::vector_size(kBytes)]] = uint16_t;
  using SignedShorts [[gnu::vector_size(kBytes)]] = int16_t;
  using Words [[gnu::vector_size(kBytes)]] = uint32_t;
  using SignedWords [[gnu::vector_size(kBytes)]] = int32_t;
  using Floats [[gnu::vector_size(kBytes)]] = float;
  using Longs [[gnu::vector_size(kBytes)]] = uint64_t;
};

constexpr int64_t kLine = 32;  // weights in a step

template <typename V>
DIMAP_HD V loaded(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

// The sum of a vector's lanes.
template <typename V>
DIMAP_HD uint64_t sum_of(V v) {
  uint64_t sum = 0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += v[lane];
  return sum;
}

template <typename Lanes>
struct Writer {
  uint8_t* mask;
  bool stream;
  DIMAP_HD void operator()(int64_t at, typename Lanes::Bytes marked) const {
    marked &= 1;
    if (stream)
      Lanes::stream(mask + at, marked);
    else
      memcpy(mask + at, &marked, sizeof marked);
  }
};

// How q is made of a key: a product of powers of two with it, converted; or it is the key, where the grid is one of
// denormals. Two factors where one would not be a normal number.
enum class Scaling { kNone, kOnce, kTwice };

template <typename Lanes, bool kMask, Scaling kScaling>
void decide_words(const uint32_t* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  using Words = typename Lanes::Words;
  using Signed = typename Lanes::SignedWords;
  using Floats = typename Lanes::Floats;
  using Longs = typename Lanes::Longs;
  constexpr int64_t kVector = Lanes::kBytes / 4, kBlock = 4 * kVector;
  const Grid grid(bracket.high);
  // Signed comparisons: keys are below 2^31. kKeyEnd is not, so it becomes the largest int, which no finite weight is.
  const auto bound = [](uint32_t key) {
    return Signed{} + static_cast<int32_t>((key < kKeyEnd ? key : kKeyEnd - 1) - 1);
  };
  const Signed below_low = bound(bracket.low), below_high = bound(bracket.high), below_limit = bound(grid.limit);
  const Signed below_marked = bound(bracket.guess < bracket.high ? bracket.guess : bracket.high);
  const Signed atom = Signed{} + static_cast<int32_t>(bracket.atom);
  const bool has_atom = bracket.atom != Bracket::kNoAtom;
  const auto power = [](uint32_t exponent) { return reinterpret_cast<Floats>(Words{} + (exponent << 23)); };  // biased
  const Floats first = power(kScaling == Scaling::kOnce ? 277 - grid.exponent : 202 - grid.exponent),
               second = power(202);
  const Writer<Lanes> write{mask, kMask && out.stream && reinterpret_cast<uintptr_t>(mask) % Lanes::kBytes == 0};
  Longs squares{}, squares_high{};
  Signed kept{}, atoms{};  // counted downwards
  int64_t aside = out.aside;
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    uint32_t between = 0;
    Signed beyond{};
    for (int64_t block = 0; block < kLine; block += kBlock) {
      Signed key[4], above[4], inside[4], marked[4];
      for (int j = 0; j < 4; ++j) {
        key[j] = loaded<Signed>(weights + i + block + j * kVector) & 0x7FFFFFFF;
        above[j] = key[j] > below_high;
        inside[j] = (key[j] > below_low) & ~above[j];
        marked[j] = key[j] > below_marked;
        kept += above[j];
        beyond |= key[j] > below_limit;
      }
      if (has_atom)
        for (int j = 0; j < 4; ++j) {
          const Signed equal = key[j] == atom;
          atoms += equal;
          inside[j] &= ~equal;
          marked[j] &= ~equal;
        }
      Longs four{};
      for (int j = 0; j < 4; ++j) {
        const Signed on_grid = key[j] & above[j] & ~(key[j] > below_limit);
        Words q = reinterpret_cast<Words>(on_grid);
        if constexpr (kScaling != Scaling::kNone) {
          Floats scaled = reinterpret_cast<Floats>(on_grid) * first;
          if constexpr (kScaling == Scaling::kTwice) scaled *= second;
          q = reinterpret_cast<Words>(__builtin_convertvector(scaled, Signed));
        }
        four += Lanes::squares(q) + Lanes::squares(reinterpret_cast<Words>(reinterpret_cast<Longs>(q) >> 32));
        if (j % 2 == 0) continue;
        squares += four;
        squares_high += four >> 32;
        four = Longs{};
      }
      if constexpr (kMask) write(i + block, Lanes::narrow(marked[0], marked[1], marked[2], marked[3]));
      between |= Lanes::bits(Lanes::narrow(inside[0], inside[1], inside[2], inside[3])) << block;
    }
    if (Lanes::bits(reinterpret_cast<typename Lanes::Bytes>(beyond))) [[unlikely]]
      for (int64_t j = i; j < i + kLine; ++j)
        if (const uint32_t key = key_of<DType::kFloat32>(weights[j]); key >= grid.limit) sum_up(key, grid, out);
    aside = set_aside(
        between, i, [&](int64_t at) { return key_of<DType::kFloat32>(weights[at]); }, out.keys, out.positions, aside);
  }
  if (write.stream) Lanes::fence();
  out.aside = aside;
  out.kept += static_cast<int64_t>(sum_of(reinterpret_cast<Words>(-kept)));
  out.atoms += static_cast<int64_t>(sum_of(reinterpret_cast<Words>(-atoms)));
  out.squares += sum_of(squares);
  out.squares_high += sum_of(squares_high);
  decide_range<DType::kFloat32>(weights, i, n, bracket, grid, mask, out);
}

template <typename Lanes, DType kType, bool kMask>
void decide_shorts(const uint16_t* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  using Shorts = typename Lanes::Shorts;
  using Signed = typename Lanes::SignedShorts;
  using Words = typename Lanes::Words;
  using Longs = typename Lanes::Longs;
  using Type = Half<kType>;
  constexpr int64_t kVector = Lanes::kBytes / 2, kBlock = 2 * kVector;
  const Type half(bracket);
  const Grid grid(bracket.high);
  // Magnitudes are below 2^15: signed comparisons.
  const auto bound = [](uint32_t bits) { return Signed{} + static_cast<int16_t>(bits - 1); };
  const Signed below_low = bound(half.low), below_high = bound(half.high), below_limit = bound(half.limit);
  const Signed below_marked = bound(half.mark), atom = Signed{} + static_cast<int16_t>(half.atom);
  const auto exponent = static_cast<int16_t>(half.exponent);
  const auto below_unit = static_cast<int16_t>((half.exponent - 1) << Type::kFraction);
  const bool has_atom = half.atom != Type::kNone;
  const Writer<Lanes> write{mask, kMask && out.stream && reinterpret_cast<uintptr_t>(mask) % Lanes::kBytes == 0};
  const auto key_at = [&](int64_t at) { return key_of<kType>(weights[at]); };
  Longs sums{}, sums_high{};
  Signed kept{}, atoms{};  // counted downwards; at most 8,192 a lane in a call of 65,536 weights
  int64_t aside = out.aside;
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    uint32_t between = 0;
    Signed beyond{};
    for (int64_t block = 0; block < kLine; block += kBlock) {
      Signed inside[2], marked[2];
      Words pairs{};
      for (int j = 0; j < 2; ++j) {
        const Signed m = loaded<Signed>(weights + i + block + j * kVector) & int16_t{0x7FFF};
        Signed above = m > below_high;
        inside[j] = (m > below_low) & ~above;
        marked[j] = m > below_marked;
        kept += above;
        const Signed far = m > below_limit;
        beyond |= far;
        if (has_atom) {
          const Signed equal = m == atom;
          atoms += equal;
          inside[j] &= ~equal;
          marked[j] &= ~equal;
        }
        above &= ~far;
        // How far its exponent is above that of a unit; what is left of it in the significand's place is the hidden
        // bit.
        Signed shift = (m >> Type::kFraction) - exponent;
        shift &= shift > 0;
        const Signed significand = m - (shift << Type::kFraction) - below_unit;
        const Shorts q = Lanes::shifted(reinterpret_cast<Shorts>(significand), reinterpret_cast<Shorts>(shift));
        pairs += Lanes::pairs(q & reinterpret_cast<Shorts>(above));
      }
      sums += reinterpret_cast<Longs>(pairs) & 0xFFFFFFFF;
      sums_high += reinterpret_cast<Longs>(pairs) >> 32;
      if constexpr (kMask) write(i + block, Lanes::narrow(marked[0], marked[1]));
      between |= Lanes::bits(Lanes::narrow(inside[0], inside[1])) << block;
    }
    if (Lanes::bits(reinterpret_cast<typename Lanes::Bytes>(beyond))) [[unlikely]]
      for (int64_t j = i; j < i + kLine; ++j)
        if (const uint32_t bits = weights[j] & 0x7FFFu; bits >= half.limit) sum_up(key_at(j), grid, out);
    aside = set_aside(between, i, key_at, out.keys, out.positions, aside);
  }
  if (write.stream) Lanes::fence();
  out.aside = aside;
  out.kept += static_cast<int64_t>(sum_of(reinterpret_cast<Shorts>(-kept)));
  out.atoms += static_cast<int64_t>(sum_of(reinterpret_cast<Shorts>(-atoms)));
  half.add(u128{sum_of(sums)} + sum_of(sums_high), out);
  decide_range<kType>(weights, i, n, bracket, grid, mask, out);
}

template <typename Lanes, DType kType>
void decide_lanes(const void* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  if constexpr (kType == DType::kFloat32) {
    const auto* words = static_cast<const uint32_t*>(weights);
    const auto run = [&]<Scaling kScaling>() {
      mask ? decide_words<Lanes, true, kScaling>(words, n, bracket, mask, out)
           : decide_words<Lanes, false, kScaling>(words, n, bracket, mask, out);
    };
    const uint32_t exponent = bracket.high >> 23;
    if (exponent == 0)
      run.template operator()<Scaling::kNone>();
    else if (exponent < 24)
      run.template operator()<Scaling::kTwice>();
    else
      run.template operator()<Scaling::kOnce>();
  } else {
    const auto* shorts = static_cast<const uint16_t*>(weights);
    mask ? decide_shorts<Lanes, kType, true>(shorts, n, bracket, mask, out)
         : decide_shorts<Lanes, kType, false>(shorts, n, bracket, mask, out);
  }
}

}  // namespace
}  // namespace dimap::cpu
