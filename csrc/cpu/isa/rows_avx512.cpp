#include <immintrin.h>

#include "cpu/isa/rows.h"

namespace dimap::cpu {

double score_rows_avx512(const Bucket& bucket, const Bucket* next, double before, Rows& rows) {
  return score_rows(bucket, next, before, rows, [](const uint16_t* row, uint16_t x, uint32_t n) {
    const uint32_t at_least =
        _mm512_cmpge_epu16_mask(_mm512_load_si512(row), _mm512_set1_epi16(static_cast<int16_t>(x)));
    return static_cast<int32_t>(_mm_popcnt_u32(_bzhi_u32(at_least, n)));
  });
}

}  // namespace dimap::cpu
