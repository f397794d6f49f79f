#include "cpu/isa/rows.h"

namespace dimap::cpu {

double score_rows_portable(const Bucket& bucket, const Bucket* next, double before, Rows& rows) {
  return score_rows(bucket, next, before, rows, [](const uint16_t* row, uint16_t x, uint32_t n) {
    int32_t rank = 0;
    for (uint32_t j = 0; j < n; ++j) rank += row[j] >= x;
    return rank;
  });
}

}  // namespace dimap::cpu
