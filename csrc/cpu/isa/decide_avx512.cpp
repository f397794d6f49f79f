// AVX-512 (F, BW, DQ, VL): 64 weights a step, one cache line of mask.
//
// Nothing here may run before the processor was asked: this file has no static initialisers, and all it holds has
// internal linkage but the table at its end.
#include <immintrin.h>

#include "cpu/isa/decide_portable.h"

namespace dimap::cpu {
namespace {

template <DType kType>
inline __m512i load_keys(const storage_t<kType>* p) {
  if constexpr (kType == DType::kFloat32) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0x7FFFFFFF));
  } else {
    const __m256i half =
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi16(0x7FFF));
    if constexpr (kType == DType::kBFloat16)
      return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    else
      return _mm512_castps_si512(_mm512_cvtph_ps(half));
  }
}

// Of one weight.
template <DType kType>
inline uint32_t key_in(storage_t<kType> w) {
  if constexpr (kType == DType::kFloat16)
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_castps_si128(_mm_cvtph_ps(_mm_cvtsi32_si128(w & 0x7FFF)))));
  else
    return key_of<kType>(w);
}

inline uint64_t line_of(const __mmask16 (&m)[4]) {
  return static_cast<uint64_t>(m[0]) | static_cast<uint64_t>(m[1]) << 16 | static_cast<uint64_t>(m[2]) << 32 |
         static_cast<uint64_t>(m[3]) << 48;
}

inline void store_line(uint8_t* mask, uint64_t marked, bool stream) {
  const __m512i bytes = _mm512_maskz_set1_epi8(marked, 1);
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(mask), bytes);
  else
    _mm512_storeu_si512(mask, bytes);
}

struct Squares {
  __m512i sum = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  void add(__m512i q, __m512i r) {
    const __m512i four = _mm512_add_epi64(pairs(q), pairs(r));
    sum = _mm512_add_epi64(sum, four);
    high = _mm512_add_epi64(high, _mm512_srli_epi64(four, 32));
  }
  static __m512i pairs(__m512i q) {
    const __m512i odd = _mm512_srli_epi64(q, 32);
    return _mm512_add_epi64(_mm512_mul_epu32(q, q), _mm512_mul_epu32(odd, odd));
  }
};

inline uint64_t sum_of(__m512i v) {  // modulo 2^64; GCC's own reduction adds signed numbers
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, v);
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

// kScale: q is the weight times a power of two, converted: two operations instead of four on its bits. It takes a grid
// whose unit is a normal float32.
template <DType kType, bool kMask, bool kScale>
void decide(const storage_t<kType>* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  const Grid grid(bracket.high);
  const __m512i low = _mm512_set1_epi32(static_cast<int>(bracket.low));
  const __m512i high = _mm512_set1_epi32(static_cast<int>(bracket.high));
  const __m512i mark = _mm512_set1_epi32(static_cast<int>(bracket.guess < bracket.high ? bracket.guess : bracket.high));
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(grid.limit));
  const __m512i atom = _mm512_set1_epi32(static_cast<int>(bracket.atom));
  const __m512i exponent = _mm512_set1_epi32(static_cast<int>(grid.exponent));
  const __m512i implicit = _mm512_set1_epi32(static_cast<int>(grid.implicit));
  const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>((277 - grid.exponent) << 23)));
  const __m512i fraction = _mm512_set1_epi32(0x7FFFFF);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const bool stream = kMask && out.stream && reinterpret_cast<uintptr_t>(mask) % 64 == 0;
  const bool has_atom = bracket.atom != Bracket::kNoAtom;
  Squares squares;
  int64_t aside = out.aside, kept = 0, atoms = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i key[4];
    __mmask16 above[4], from_low[4], marked[4];
    for (int j = 0; j < 4; ++j) {
      key[j] = load_keys<kType>(weights + i + 16 * j);
      above[j] = _mm512_cmpge_epu32_mask(key[j], high);
      from_low[j] = _mm512_cmpge_epu32_mask(key[j], low);
      if constexpr (kMask) marked[j] = _mm512_cmpge_epu32_mask(key[j], mark);
    }
    const uint64_t kept_line = line_of(above);
    uint64_t between = line_of(from_low) & ~kept_line;
    uint64_t marked_line = kMask ? line_of(marked) : 0;
    kept += __builtin_popcountll(kept_line);
    if (has_atom) {
      __mmask16 equal[4];
      for (int j = 0; j < 4; ++j) equal[j] = _mm512_cmpeq_epi32_mask(key[j], atom);
      const uint64_t line = line_of(equal);
      atoms += __builtin_popcountll(line);
      between &= ~line;
      marked_line &= ~line;
    }
    const __m512i top = _mm512_max_epu32(_mm512_max_epu32(key[0], key[1]), _mm512_max_epu32(key[2], key[3]));
    __mmask16 on_grid[4] = {above[0], above[1], above[2], above[3]};
    if (_mm512_cmpge_epu32_mask(top, limit)) [[unlikely]] {
      for (int j = 0; j < 4; ++j) {
        const __mmask16 beyond = _mm512_cmpge_epu32_mask(key[j], limit);
        on_grid[j] = static_cast<__mmask16>(on_grid[j] & ~beyond);
        for (unsigned bits = beyond; bits; bits &= bits - 1)
          sum_up(key_in<kType>(weights[i + 16 * j + __builtin_ctz(bits)]), grid, out);
      }
    }
    const auto on_the_grid = [&](int j) {
      if constexpr (kScale) {
        const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(key[j]), factor);
        return _mm512_maskz_cvttps_epu32(on_grid[j], scaled);
      } else {
        const __m512i shift = _mm512_subs_epu16(_mm512_srli_epi32(key[j], 23), exponent);
        const __m512i m = _mm512_ternarylogic_epi32(key[j], fraction, implicit, 0xEA);  // (a & b) | c
        return _mm512_maskz_sllv_epi32(on_grid[j], m, shift);
      }
    };
    for (int j = 0; j < 4; j += 2) squares.add(on_the_grid(j), on_the_grid(j + 1));
    if constexpr (kMask) store_line(mask + i, marked_line, stream);
    if (__builtin_popcountll(between) > 8) [[unlikely]] {
      for (int j = 0; j < 4; ++j) {
        const auto inside = static_cast<__mmask16>(between >> (16 * j));
        const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(i + 16 * j)));
        _mm512_storeu_si512(out.keys + aside, _mm512_maskz_compress_epi32(inside, key[j]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.positions + aside),
                            _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(inside, index)));
        aside += __builtin_popcount(inside);
      }
    } else {
      aside =
          set_aside(between, i, [&](int64_t at) { return key_in<kType>(weights[at]); }, out.keys, out.positions, aside);
    }
  }
  if (stream) _mm_sfence();
  out.aside = aside;
  out.kept += kept;
  out.atoms += atoms;
  out.squares += sum_of(squares.sum);
  out.squares_high += sum_of(squares.high);
  decide_range<kType>(weights, i, n, bracket, grid, mask, out);
}

// 16-bit types on lanes of 16 bits, 32 a vector.
template <DType kType, bool kMask>
void decide_half(const uint16_t* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  using Type = Half<kType>;
  const Type half(bracket);
  const Grid grid(bracket.high);
  const auto all = [](uint32_t value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); };
  const __m512i magnitude = all(0x7FFF), low = all(half.low), width = all(half.high - half.low);
  const __m512i high = all(half.high), mark = all(half.mark), limit = all(half.limit), atom = all(half.atom);
  const __m512i exponent = all(half.exponent), implicit = all(1u << Type::kFraction),
                fraction = all((1u << Type::kFraction) - 1);
  const __m512i low_words = _mm512_set1_epi64(0xFFFFFFFF);
  const bool stream = kMask && out.stream && reinterpret_cast<uintptr_t>(mask) % 64 == 0;
  const bool has_atom = half.atom != Type::kNone;
  const auto line = [](const __mmask32(&k)[2]) {
    return static_cast<uint64_t>(k[0]) | static_cast<uint64_t>(k[1]) << 32;
  };
  __m512i sums = _mm512_setzero_si512(), sums_high = sums;
  int64_t aside = out.aside, kept = 0, atoms = 0;
  int64_t i = 0;
  while (i + 64 <= n) {
    __m512i pairs = _mm512_setzero_si512();  // sums of two squares, 32 bits each
    const int64_t room = i + 32 * Type::kPairs, end = room <= n ? room : i + 64;
    for (; i < end; i += 64) {
      __m512i m[2];
      __mmask32 above[2], inside[2], marked[2];
      for (int j = 0; j < 2; ++j) {
        m[j] = _mm512_and_si512(magnitude, _mm512_loadu_si512(weights + i + 32 * j));
        above[j] = _mm512_cmpge_epu16_mask(m[j], high);
        inside[j] = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(m[j], low), width);
        if constexpr (kMask) marked[j] = _mm512_cmpge_epu16_mask(m[j], mark);
      }
      uint64_t between = line(inside);
      uint64_t marked_line = kMask ? line(marked) : 0;
      kept += __builtin_popcountll(line(above));
      if (has_atom) {
        const __mmask32 equal[2] = {_mm512_cmpeq_epi16_mask(m[0], atom), _mm512_cmpeq_epi16_mask(m[1], atom)};
        atoms += __builtin_popcountll(line(equal));
        between &= ~line(equal);
        marked_line &= ~line(equal);
      }
      const __m512i top = _mm512_max_epu16(m[0], m[1]);
      if (_mm512_cmpge_epu16_mask(top, limit)) [[unlikely]] {
        for (int j = 0; j < 2; ++j) {
          const __mmask32 beyond = _mm512_cmpge_epu16_mask(m[j], limit);
          above[j] &= ~beyond;
          for (uint32_t bits = beyond; bits; bits &= bits - 1)
            sum_up(key_in<kType>(weights[i + 32 * j + __builtin_ctz(bits)]), grid, out);
        }
      }
      for (int j = 0; j < 2; ++j) {
        const __m512i shift = _mm512_subs_epu16(_mm512_srli_epi16(m[j], Type::kFraction), exponent);
        const __m512i significands = _mm512_ternarylogic_epi32(m[j], fraction, implicit, 0xEA);  // (a & b) | c
        const __m512i q = _mm512_maskz_sllv_epi16(above[j], significands, shift);
        pairs = _mm512_add_epi32(pairs, _mm512_madd_epi16(q, q));
      }
      if constexpr (kMask) store_line(mask + i, marked_line, stream);
      aside =
          set_aside(between, i, [&](int64_t at) { return key_in<kType>(weights[at]); }, out.keys, out.positions, aside);
    }
    sums = _mm512_add_epi64(sums, _mm512_and_si512(pairs, low_words));
    sums_high = _mm512_add_epi64(sums_high, _mm512_srli_epi64(pairs, 32));
  }
  if (stream) _mm_sfence();
  out.aside = aside;
  out.kept += kept;
  out.atoms += atoms;
  half.add(static_cast<u128>(sum_of(sums)) + sum_of(sums_high), out);
  decide_range<kType>(weights, i, n, bracket, grid, mask, out);
}

template <DType kType>
void decide_any(const void* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  const auto* typed = static_cast<const storage_t<kType>*>(weights);
  if constexpr (kType != DType::kFloat32) {
    if (bracket.high >> 23 > Half<kType>::kBias)  // a normal number of the type
      return mask ? decide_half<kType, true>(typed, n, bracket, mask, out)
                  : decide_half<kType, false>(typed, n, bracket, mask, out);
  }
  const bool scaled = bracket.high >> 23 >= 24 && bracket.high < kNonFinite;
  const auto run = mask ? (scaled ? decide<kType, true, true> : decide<kType, true, false>)
                        : (scaled ? decide<kType, false, true> : decide<kType, false, false>);
  run(typed, n, bracket, mask, out);
}

template <DType kType>
void zero(void* weights, int64_t n, uint32_t keep_from, uint32_t tie) {
  zero_range<kType>(static_cast<storage_t<kType>*>(weights), n, keep_from, tie);
}

}  // namespace

const Kernels kAvx512 = {
    "avx512",
    {decide_any<DType::kFloat32>, decide_any<DType::kBFloat16>, decide_any<DType::kFloat16>},
    {zero<DType::kFloat32>, zero<DType::kBFloat16>, zero<DType::kFloat16>},
    score_rows_avx512,
    {mark_words_avx2, mark_shorts_avx2, mark_shorts_avx2},  // as fast as memory
};

}  // namespace dimap::cpu
