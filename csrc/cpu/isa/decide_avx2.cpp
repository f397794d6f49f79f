// AVX2. As in decide_avx512.cpp, nothing here may run before the processor was asked.
#include <immintrin.h>

#include "cpu/isa/mark_lanes.h"

namespace dimap::cpu {
namespace {

struct Avx2 : Vectors<32> {
  static constexpr int kBytes = 32;
  template <typename V>
  static __m256i raw(V v) {
    return reinterpret_cast<__m256i>(v);
  }
  template <typename V>
  static Bytes narrow(V a, V b, V c, V d) {  // packing works on each half of a vector
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(raw(a), raw(b)), _mm256_packs_epi32(raw(c), raw(d)));
    return reinterpret_cast<Bytes>(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
  template <typename V>
  static Bytes narrow(V a, V b) {
    return reinterpret_cast<Bytes>(_mm256_permute4x64_epi64(_mm256_packs_epi16(raw(a), raw(b)), 0xD8));
  }
  static uint32_t bits(Bytes lanes) { return static_cast<uint32_t>(_mm256_movemask_epi8(raw(lanes))); }
  static Longs squares(Words q) { return reinterpret_cast<Longs>(_mm256_mul_epu32(raw(q), raw(q))); }
  static Words pairs(Shorts q) { return reinterpret_cast<Words>(_mm256_madd_epi16(raw(q), raw(q))); }
  static Shorts shifted(Shorts m, Shorts by) {  // no shift by lanes: a product with a power of two from a table
    const __m256i powers = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    return m * reinterpret_cast<Shorts>(_mm256_shuffle_epi8(powers, raw(by | 0x8000)));
  }
  static void stream(uint8_t* to, Bytes bytes) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), raw(bytes)); }
  static void fence() { _mm_sfence(); }
};

template <DType kType>
void zero(void* weights, int64_t n, uint32_t keep_from, uint32_t tie) {
  zero_range<kType>(static_cast<storage_t<kType>*>(weights), n, keep_from, tie);
}

}  // namespace

uint32_t mark_words_avx2(const void* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
  return mark_groups<Avx2, uint32_t>(weights, blocks, inner, n, m, mask);
}
uint32_t mark_shorts_avx2(const void* weights, int64_t blocks, int64_t inner, int n, int m, uint8_t* mask) {
  return mark_groups<Avx2, uint16_t>(weights, blocks, inner, n, m, mask);
}

const Kernels kAvx2 = {
    "avx2",
    {decide_lanes<Avx2, DType::kFloat32>, decide_lanes<Avx2, DType::kBFloat16>, decide_lanes<Avx2, DType::kFloat16>},
    {zero<DType::kFloat32>, zero<DType::kBFloat16>, zero<DType::kFloat16>},
    score_rows_avx2,
    {mark_words_avx2, mark_shorts_avx2, mark_shorts_avx2},
};

}  // namespace dimap::cpu
