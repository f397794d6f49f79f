// AVX2 and F16C: 32 weights a step. As in decide_avx512.cpp, nothing here may run before the processor was asked.
#include <immintrin.h>

#include "cpu/isa/decide_portable.h"

namespace dimap::cpu {
namespace {

template <DType kType>
inline __m256i load_keys(const storage_t<kType>* p) {
  if constexpr (kType == DType::kFloat32) {
    return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(0x7FFFFFFF));
  } else {
    const __m128i half = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi16(0x7FFF));
    if constexpr (kType == DType::kBFloat16)
      return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    else
      return _mm256_castps_si256(_mm256_cvtph_ps(half));
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

inline uint32_t bits_of(__m256i lanes) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes))); }

inline uint64_t sum_of(__m256i v) {
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

template <DType kType, bool kMask>
void decide(const storage_t<kType>* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  const Grid grid(bracket.high);
  // Signed comparisons: keys are below 2^31. kKeyEnd is not, so it becomes the largest int, which no key reaches as a
  // finite weight.
  auto bound = [](uint32_t key) { return _mm256_set1_epi32(static_cast<int>(key < kKeyEnd ? key : kKeyEnd - 1) - 1); };
  const __m256i below_low = bound(bracket.low), below_high = bound(bracket.high);
  const __m256i below_marked = bound(bracket.guess < bracket.high ? bracket.guess : bracket.high);
  const __m256i below_limit = bound(grid.limit);
  const __m256i atom = _mm256_set1_epi32(static_cast<int>(bracket.atom));
  const __m256i exponent = _mm256_set1_epi32(static_cast<int>(grid.exponent));
  const __m256i implicit = _mm256_set1_epi32(static_cast<int>(grid.implicit));
  const __m256i fraction = _mm256_set1_epi32(0x7FFFFF);
  const bool stream = kMask && out.stream && reinterpret_cast<uintptr_t>(mask) % 32 == 0;
  __m256i largest = _mm256_setzero_si256();
  __m256i squares = _mm256_setzero_si256(), squares_high = _mm256_setzero_si256();
  int64_t aside = out.aside, kept = 0, atoms = 0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i key[4], above[4], marked[4];
    uint32_t line = 0, between = 0;
    for (int j = 0; j < 4; ++j) {
      key[j] = load_keys<kType>(weights + i + 8 * j);
      above[j] = _mm256_cmpgt_epi32(key[j], below_high);
      const __m256i equal = _mm256_cmpeq_epi32(key[j], atom);
      marked[j] = _mm256_andnot_si256(equal, _mm256_cmpgt_epi32(key[j], below_marked));
      const __m256i inside =
          _mm256_andnot_si256(_mm256_or_si256(above[j], equal), _mm256_cmpgt_epi32(key[j], below_low));
      line |= bits_of(above[j]) << (8 * j);
      between |= bits_of(inside) << (8 * j);
      atoms += __builtin_popcount(bits_of(equal));
    }
    const __m256i top = _mm256_max_epi32(_mm256_max_epi32(key[0], key[1]), _mm256_max_epi32(key[2], key[3]));
    largest = _mm256_max_epi32(largest, top);
    const bool beyond_grid = bits_of(_mm256_cmpgt_epi32(top, below_limit)) != 0;
    for (int j = 0; j < 4; ++j) {
      __m256i counted = above[j];
      if (beyond_grid) [[unlikely]] {
        const __m256i beyond = _mm256_cmpgt_epi32(key[j], below_limit);
        alignas(32) uint32_t keys[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(keys), key[j]);
        for (uint32_t bits = out.outliers ? bits_of(beyond) : 0; bits; bits &= bits - 1) {
          const uint32_t k = keys[__builtin_ctz(bits)];
          if (k < kNonFinite) out.outliers->add_key(k);
        }
        counted = _mm256_andnot_si256(beyond, counted);
      }
      const __m256i shift = _mm256_subs_epu16(_mm256_srli_epi32(key[j], 23), exponent);
      const __m256i m = _mm256_or_si256(_mm256_and_si256(key[j], fraction), implicit);
      const __m256i q = _mm256_and_si256(_mm256_sllv_epi32(m, shift), counted);
      const __m256i odd_q = _mm256_srli_epi64(q, 32);
      const __m256i even = _mm256_mul_epu32(q, q), odd = _mm256_mul_epu32(odd_q, odd_q);
      squares = _mm256_add_epi64(squares, _mm256_add_epi64(even, odd));
      squares_high =
          _mm256_add_epi64(squares_high, _mm256_add_epi64(_mm256_srli_epi64(even, 32), _mm256_srli_epi64(odd, 32)));
    }
    kept += __builtin_popcount(line);
    if constexpr (kMask) {
      const __m256i one = _mm256_set1_epi8(1);
      const __m256i bytes = _mm256_and_si256(
          _mm256_permutevar8x32_epi32(
              _mm256_packs_epi16(_mm256_packs_epi32(marked[0], marked[1]), _mm256_packs_epi32(marked[2], marked[3])),
              _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)),
          one);
      if (stream)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(mask + i), bytes);
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + i), bytes);
    }
    aside =
        set_aside(between, i, [&](int64_t at) { return key_in<kType>(weights[at]); }, out.keys, out.positions, aside);
  }
  if (stream) _mm_sfence();
  alignas(32) uint32_t tops[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(tops), largest);
  for (uint32_t top : tops) out.largest = top > out.largest ? top : out.largest;
  out.aside = aside;
  out.kept += kept;
  out.atoms += atoms;
  out.squares += sum_of(squares);
  out.squares_high += sum_of(squares_high);
  decide_range<kType>(weights, i, n, bracket, grid, mask, out);
}

template <DType kType>
void decide_any(const void* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  const auto* typed = static_cast<const storage_t<kType>*>(weights);
  if (mask)
    decide<kType, true>(typed, n, bracket, mask, out);
  else
    decide<kType, false>(typed, n, bracket, mask, out);
}

template <DType kType>
void zero(void* weights, int64_t n, uint32_t keep_from, uint32_t tie) {
  zero_range<kType>(static_cast<storage_t<kType>*>(weights), n, keep_from, tie);
}

}  // namespace

const Kernels kAvx2 = {
    "avx2",
    {decide_any<DType::kFloat32>, decide_any<DType::kBFloat16>, decide_any<DType::kFloat16>},
    {zero<DType::kFloat32>, zero<DType::kBFloat16>, zero<DType::kFloat16>},
    score_rows_avx2,
};

}  // namespace dimap::cpu
