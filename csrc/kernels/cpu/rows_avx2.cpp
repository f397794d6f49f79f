#include <immintrin.h>

#include "rows.h"

namespace dimap::cpu {

double score_rows_avx2(const Bucket& bucket, const Bucket* next, double before, Rows& rows) {
  return score_rows(bucket, next, before, rows, [](const uint16_t* row, uint16_t x, uint32_t n) {
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(row));
    const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(x));
    const auto at_least = static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(values, wanted), values)));  // two bits a value
    return static_cast<int32_t>(_mm_popcnt_u32(n < Rows::kRoom ? _bzhi_u32(at_least, 2 * n) : at_least)) / 2;
  });
}

}  // namespace dimap::cpu
