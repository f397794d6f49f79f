#include <immintrin.h>

#include "rows.h"

namespace dimap::cpu {

double score_rows_avx512(const Bucket& bucket, const Bucket* next, double before, Rows& rows) {
  return score_rows(bucket, next, before, rows, [](const uint16_t* row, uint16_t x, uint32_t n) {
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(row));
    const uint32_t at_least = _mm256_cmpge_epu16_mask(values, _mm256_set1_epi16(static_cast<int16_t>(x)));
    return static_cast<int32_t>(_mm_popcnt_u32(_bzhi_u32(at_least, n)));
  });
}

}  // namespace dimap::cpu
