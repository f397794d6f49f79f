#include <immintrin.h>

#include "cpu/isa/rows.h"

namespace dimap::cpu {

double score_rows_avx2(const Bucket& bucket, const Bucket* next, double before, Rows& rows) {
  return score_rows(bucket, next, before, rows, [](const uint16_t* row, uint16_t x, uint32_t n) {
    const auto* values = reinterpret_cast<const __m256i*>(row);
    const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(x));
    auto at_least = [&](__m256i v) { return _mm256_cmpeq_epi16(_mm256_max_epu16(v, wanted), v); };
    const __m256i bytes =
        _mm256_packs_epi16(at_least(_mm256_load_si256(values)), at_least(_mm256_load_si256(values + 1)));
    const auto mask = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
    return static_cast<int32_t>(_mm_popcnt_u32(_bzhi_u32(mask, n)));
  });
}

}  // namespace dimap::cpu
