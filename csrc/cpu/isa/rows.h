// Ranks inside a bucket: 65,536 neighbouring keys, spread over rows of a few weights each.
//
// All weights of a bucket share the high 15 bits of their key; the low 16 tell them apart. With as many rows as there
// are groups of some ten weights, a weight's rank is that of its row plus its place among at most kRoom others, found
// by one comparison with all of them: no sort, and everything stays in the cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/magnitude.h"

namespace dimap::cpu {

constexpr int kBucketShift = 16;  // a bucket is key >> kBucketShift

// Weights of one bucket that lie together, in memory of the score's own.
struct Run {
  const uint16_t* low;  // [n] the low bits of their keys
  float* score;         // [n] out
  int64_t n;
};

struct Bucket {
  uint32_t key;  // its smallest
  const Run* runs;
  int64_t run_count;
  int64_t n;  // weights
};

// Working memory of one worker.
struct Rows {
  static constexpr int kRoom = 32;              // weights in a row at most: one cache line
  static constexpr int kUsual = 12;             // and on average, at most
  static constexpr int kLeast = 6;              // log2 of the fewest rows
  static constexpr int kMost = 12;              // and of the most
  static constexpr int64_t kFewest = 64;        // weights that are worth it
  static constexpr int64_t kWeights = 1 << 15;  // and the most that fit, so that sums stay below 2^63

  alignas(64) uint16_t low[(int64_t{1} << kMost) * kRoom + 256];  // a row may overrun before it is noticed
  alignas(64) uint32_t held[1 << kMost];                          // count << 24 | sum of the offsets in the row
  alignas(64) uint64_t above[1 << kMost];
  alignas(64) double inverse[1 << kMost];
};

DIMAP_HD void prefetch(const Run& run, bool scores) {
  constexpr int64_t kLine = 64;
  if (scores)
    for (int64_t i = 0; i < run.n; i += kLine / 4) __builtin_prefetch(run.score + i, 1);
  else
    for (int64_t i = 0; i < run.n; i += kLine / 2) __builtin_prefetch(run.low + i, 0);
}

// Scores the bucket's weights. before: the energy of all larger weights of the layer; next: the bucket after it, whose
// memory is fetched meanwhile, or null. Returns the bucket's energy; or -1 with no score written where rows do not
// serve: few weights, too many of them alike, subnormal ones, or shares so large that the approximation below would
// show.
//
// Of the weights in the same row that are larger, the count is exact and their square is taken for the weight's own:
// they differ by less than 2^(bits-22), bits being log2 of the keys in a row. While a weight's share, times the weights
// in a row, is at most 2^-3-bits, S(w) is off by less than 2^-25 of itself: under one unit in the last place of the
// float32 score. Where shares are large rows are finer.
using ScoreRowsFn = double (*)(const Bucket& bucket, const Bucket* next, double before, Rows& rows);

// rank(row, x, n): how many of the row's first n values are >= x; row is aligned and has kRoom values.
template <typename Rank>
DIMAP_HD double score_rows(const Bucket& bucket, const Bucket* next, double before, Rows& rows, Rank&& rank) {
  constexpr uint32_t kLow = (1u << kBucketShift) - 1;
  if (bucket.n <= Rows::kFewest || bucket.n > Rows::kWeights || bucket.key >> 23 == 0) return -1;
  const double largest = squared_value(bucket.key | kLow);
  const double share = largest / (before + largest);
  int log_rows = Rows::kLeast;
  while (int64_t{Rows::kUsual} << log_rows < bucket.n) ++log_rows;
  auto too_coarse = [&](int64_t in_fullest) {
    return share * static_cast<double>(in_fullest) > power_of_two(log_rows - kBucketShift - 3);
  };
  while (log_rows <= Rows::kMost && too_coarse(4 + 3 * (bucket.n >> log_rows))) ++log_rows;
  if (log_rows > Rows::kMost || share > power_of_two(-12)) return -1;
  const int bits = kBucketShift - log_rows;

  const int64_t n_rows = int64_t{1} << log_rows;
  const uint32_t in_row = (1u << bits) - 1;
  memset(rows.held, 0, static_cast<size_t>(n_rows) * sizeof(uint32_t));
  for (int64_t r = 0; r < bucket.run_count; ++r) {
    const Run& run = bucket.runs[r];
    if (next != nullptr && r < next->run_count) prefetch(next->runs[r], false);
    for (int64_t i = 0; i < run.n; ++i) {
      const uint32_t x = run.low[i];
      const uint32_t row = x >> bits;
      const uint32_t held = rows.held[row];
      rows.low[row * Rows::kRoom + (held >> 24)] = static_cast<uint16_t>(x);
      rows.held[row] = held + (1u << 24) + (x & in_row);
    }
  }
  const uint64_t base = significand(bucket.key);
  uint32_t fullest = 0;
  int64_t total = 0;
  for (int64_t row = 0; row < n_rows; ++row) {
    const uint32_t count = rows.held[row] >> 24, offsets = rows.held[row] & 0xFFFFFFu;
    const uint64_t first = base + (static_cast<uint64_t>(row) << bits);
    rows.above[row] = first * (count * first + 2 * offsets);  // the squares of the offsets are left out: < 2^-25 of it
    fullest = count > fullest ? count : fullest;
    total += count;
  }
  if (fullest > Rows::kRoom || too_coarse(fullest) || total != bucket.n)
    return -1;  // a count of 256 has run over: the total tells
  uint64_t energy = 0;
  for (int64_t row = n_rows; row-- > 0;) {
    const uint64_t own = rows.above[row];
    rows.above[row] = energy;
    energy += own;
  }
  const double unit = power_of_two(2 * scale(bucket.key) - 298);
  for (int64_t row = 0; row < n_rows; ++row)
    rows.inverse[row] = unit / (before + unit * static_cast<double>(static_cast<int64_t>(rows.above[row])));

  constexpr int64_t kSpan = 128;
  alignas(64) double inverse[kSpan];
  alignas(64) int32_t ranks[kSpan];
  for (int64_t r = 0; r < bucket.run_count; ++r) {
    const Run& run = bucket.runs[r];
    if (next != nullptr && r < next->run_count) prefetch(next->runs[r], true);
    for (int64_t at = 0; at < run.n; at += kSpan) {
      const int64_t n = run.n - at < kSpan ? run.n - at : kSpan;
      const uint16_t* low = run.low + at;
      float* score = run.score + at;
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t row = low[i] >> bits;
        inverse[i] = rows.inverse[row];
        ranks[i] = rank(rows.low + row * Rows::kRoom, low[i], rows.held[row] >> 24);
      }
      for (int64_t i = 0; i < n; ++i) {
        const double m = static_cast<double>(base + low[i]);
        const double q = m * m * inverse[i];  // w² over the energy above the row
        const double t = ranks[i] * q;        // and what its own row adds: 1 / (1 + t) to the third order
        score[i] = static_cast<float>(q * (1 - t * (1 - t)));
      }
    }
  }
  return unit * static_cast<double>(energy);
}

double score_rows_portable(const Bucket& bucket, const Bucket* next, double before, Rows& rows);
#if defined(DIMAP_X86)
double score_rows_avx2(const Bucket& bucket, const Bucket* next, double before, Rows& rows);
double score_rows_avx512(const Bucket& bucket, const Bucket* next, double before, Rows& rows);
#endif

}  // namespace dimap::cpu
