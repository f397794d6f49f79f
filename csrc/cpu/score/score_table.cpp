#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/score/score_layer.h"

namespace dimap::cpu {
namespace {

constexpr int kMagnitudes = 1 << 15;
constexpr int kTables = 4;  // histograms of a worker: runs of equal weights do not wait for one counter

// Looks up n scores. Whole cache lines go past the caches where the processor can: others would be read first.
void look_up(const float* table, const uint16_t* weights, int64_t n, float* scores) {
  int64_t i = 0;
#if defined(__SSE2__)
  constexpr int64_t kLine = 16;
  for (; i < n && reinterpret_cast<uintptr_t>(scores + i) % 64 != 0; ++i) scores[i] = table[weights[i] & 0x7FFF];
  for (; i + kLine <= n; i += kLine)
    for (int64_t j = i; j < i + kLine; j += 4) {
      uint64_t four;
      std::memcpy(&four, weights + j, sizeof four);
      const auto at = [&](int lane) { return table[four >> (16 * lane) & 0x7FFF]; };
      _mm_stream_ps(scores + j, _mm_setr_ps(at(0), at(1), at(2), at(3)));
    }
  _mm_sfence();
#endif
  for (; i < n; ++i) scores[i] = table[weights[i] & 0x7FFF];
}

template <DType kType>
void score_typed(std::span<const Piece> pieces, const Pool& pool) {
  const auto workers = static_cast<size_t>(pool.workers());
  std::vector<uint32_t> counts(workers * kTables * kMagnitudes);
  std::vector<int64_t> total(kMagnitudes);
  std::vector<int64_t> counted(workers);
  std::mutex lock;
  auto flush = [&](size_t worker) {
    const std::lock_guard guard(lock);
    uint32_t* count = counts.data() + worker * kTables * kMagnitudes;
    for (int table = 0; table < kTables; ++table)
      for (int m = 0; m < kMagnitudes; ++m) total[m] += count[table * kMagnitudes + m];
    std::fill(count, count + kTables * kMagnitudes, 0);
    counted[worker] = 0;
  };
  pool.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t p, int worker) {
    const Piece& piece = pieces[p];
    if (counted[worker] + piece.n > int64_t{1} << 31) flush(static_cast<size_t>(worker));
    counted[worker] += piece.n;
    uint32_t* count = counts.data() + static_cast<size_t>(worker) * kTables * kMagnitudes;
    const auto* w = weights_of<kType>(piece);
    int64_t i = 0;
    for (; i + kTables <= piece.n; i += kTables)
      for (int j = 0; j < kTables; ++j) ++count[j * kMagnitudes + (w[i + j] & 0x7FFF)];
    for (; i < piece.n; ++i) ++count[w[i] & 0x7FFF];
  });
  for (size_t w = 0; w < workers; ++w)
    if (counted[w] != 0) flush(w);
  std::vector<float> table(kMagnitudes);
  double energy = 0;
  for (int m = kMagnitudes - 1; m >= 0; --m) {
    if (total[m] == 0) continue;
    const uint32_t key = key_of<kType>(static_cast<uint16_t>(m));
    if (key >= kNonFinite) throw FoundNonFinite();
    energy += static_cast<double>(total[m]) * squared_value(key);
    table[m] = static_cast<float>(score64(key, energy));
  }
  pool.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t p, int) {
    const Piece& piece = pieces[p];
    look_up(table.data(), weights_of<kType>(piece), piece.n, piece.scores + piece.offset);
  });
}

}  // namespace

void score_by_table(DType dtype, std::span<const Piece> pieces, const Pool& pool) {
  if (dtype == DType::kBFloat16)
    score_typed<DType::kBFloat16>(pieces, pool);
  else
    score_typed<DType::kFloat16>(pieces, pool);
}

}  // namespace dimap::cpu
