#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "cpu/isa/decide.h"
#include "cpu/isa/rows.h"
#include "cpu/score/score_layer.h"

namespace dimap::cpu {
namespace {

constexpr int64_t kBlock = Parted::kBlock;
constexpr int64_t kSorted = 1 << 14;  // buckets of up to this many weights may be sorted
constexpr int64_t kSortedRuns = 512;  // in up to this many runs
constexpr int64_t kInsertion = 40;    // and of up to this many weights by insertion

double unit_of(const Bucket& bucket) { return power_of_two(2 * scale(bucket.key) - 298); }

double score_sorted(const Bucket& bucket, double before, LargeBuffer& scratch) {
  static_assert(kSortedRuns * kBlock <= 1 << 16);
  auto* entries = scratch.room_for<uint32_t>(2 * kSorted);  // the low bits of the key, then place in the runs
  uint32_t* other = entries + kSorted;
  int64_t n = 0;
  for (int64_t r = 0; r < bucket.run_count; ++r)
    for (int64_t i = 0; i < bucket.runs[r].n; ++i, ++n)
      entries[n] = static_cast<uint32_t>(bucket.runs[r].low[i]) << 16 | static_cast<uint32_t>(r * kBlock + i);
  if (n <= kInsertion) {
    for (int64_t i = 1; i < n; ++i) {
      const uint32_t e = entries[i];
      int64_t j = i;
      for (; j > 0 && entries[j - 1] < e; --j) entries[j] = entries[j - 1];
      entries[j] = e;
    }
  } else {
    std::array<uint32_t, 256> places[2] = {};
    for (int64_t i = 0; i < n; ++i) {
      ++places[0][entries[i] >> 16 & 255];
      ++places[1][entries[i] >> 24];
    }
    for (auto& digit : places) {
      uint32_t place = 0;
      for (int64_t v = 255; v >= 0; --v) place += std::exchange(digit[v], place);
    }
    for (int64_t i = 0; i < n; ++i) other[places[0][entries[i] >> 16 & 255]++] = entries[i];
    for (int64_t i = 0; i < n; ++i) entries[places[1][other[i] >> 24]++] = other[i];
  }
  const double unit = unit_of(bucket);
  uint64_t energy = 0;
  for (int64_t i = 0; i < n;) {
    const uint32_t low = entries[i] >> 16;
    const uint64_t own = square(bucket.key | low);
    int64_t end = i;
    for (; end < n && entries[end] >> 16 == low; ++end) energy += own;
    const auto score =
        own == 0 ? 0.0f
                 : static_cast<float>(unit * static_cast<double>(own) / (before + unit * static_cast<double>(energy)));
    for (; i < end; ++i) {
      const int64_t place = entries[i] & 0xFFFF;
      bucket.runs[place / kBlock].score[place % kBlock] = score;
    }
  }
  return unit * static_cast<double>(energy);
}

// Many weights, or many alike: a histogram of all keys of the bucket.
double score_counted(const Bucket& bucket, double before, LargeBuffer& scratch) {
  constexpr int64_t kKeys = int64_t{1} << kBucketShift;
  auto* counts = scratch.room_for<uint64_t>(kKeys + kKeys / 2);
  auto* scores = reinterpret_cast<float*>(counts + kKeys);
  std::fill(counts, counts + kKeys, 0);
  for (int64_t r = 0; r < bucket.run_count; ++r)
    for (int64_t i = 0; i < bucket.runs[r].n; ++i) ++counts[bucket.runs[r].low[i]];
  double energy = 0;
  for (int64_t low = kKeys; low-- > 0;) {
    if (counts[low] == 0) continue;
    const uint32_t key = bucket.key | static_cast<uint32_t>(low);
    energy += static_cast<double>(counts[low]) * squared_value(key);
    scores[low] = static_cast<float>(score64(key, before + energy));
  }
  for (int64_t r = 0; r < bucket.run_count; ++r)
    for (int64_t i = 0; i < bucket.runs[r].n; ++i) bucket.runs[r].score[i] = scores[bucket.runs[r].low[i]];
  return energy;
}

double score_bucket(const Bucket& bucket, const Bucket* next, double before, ScoreMemory& memory) {
  const double energy = kernels().score_rows(bucket, next, before, *memory.rows.room_for<Rows>(1));
  if (energy >= 0) return energy;
  return bucket.n <= kSorted && bucket.run_count <= kSortedRuns ? score_sorted(bucket, before, memory.tables)
                                                                : score_counted(bucket, before, memory.tables);
}

double energy_of(const Bucket& bucket) {
  unsigned __int128 energy = 0;
  for (int64_t r = 0; r < bucket.run_count; ++r) {
    uint64_t sum = 0;  // a run has at most kBlock weights
    for (int64_t i = 0; i < bucket.runs[r].n; ++i) sum += square(bucket.key | bucket.runs[r].low[i]);
    energy += sum;
  }
  return unit_of(bucket) * static_cast<double>(energy);
}

}  // namespace

void score_by_buckets(std::span<const Piece> pieces, bool shared, const Pool& pool, std::span<ScoreMemory> memory) {
  const size_t shares = std::min(static_cast<size_t>(pool.workers()), pieces.size());
  pool.for_each(static_cast<int64_t>(shares), [&](int64_t s, int) {
    const size_t begin = pieces.size() * static_cast<size_t>(s) / shares;
    const size_t end = pieces.size() * static_cast<size_t>(s + 1) / shares;
    memory[s].parted.part(pieces.subspan(begin, end - begin));
  });

  uint32_t lowest = Parted::kBuckets, end = 0;
  size_t blocks = 0;
  for (const ScoreMemory& m : memory.first(shares)) {
    lowest = std::min(lowest, m.parted.lowest());
    end = std::max(end, m.parted.end());
    blocks += static_cast<size_t>(m.parted.blocks());
  }
  std::vector<Run> runs;
  runs.reserve(blocks);         // buckets point into it
  std::vector<Bucket> buckets;  // largest keys first
  for (uint32_t b = end; b-- > lowest;) {
    const size_t first = runs.size();
    int64_t n = 0;
    for (const ScoreMemory& m : memory.first(shares)) n += m.parted.runs_of(b, runs);
    if (n != 0)
      buckets.push_back({b << kBucketShift, runs.data() + first, static_cast<int64_t>(runs.size() - first), n});
  }
  if (buckets.front().key >= kNonFinite) throw FoundNonFinite();

  const auto n = static_cast<int64_t>(buckets.size());
  auto bucket = [&](int64_t b) { return b < n ? &buckets[static_cast<size_t>(b)] : nullptr; };
  if (shared) {
    std::vector<double> before(buckets.size() + 1);
    pool.for_each(n, [&](int64_t b, int) { before[b + 1] = energy_of(*bucket(b)); });
    for (int64_t b = 0; b < n; ++b) before[b + 1] += before[b];
    pool.for_each(n, [&](int64_t b, int worker) {
      score_bucket(*bucket(b), bucket(b + pool.workers()), before[b], memory[worker]);
    });
  } else {
    double before = 0;
    for (int64_t b = 0; b < n; ++b) before += score_bucket(*bucket(b), bucket(b + 1), before, memory[0]);
  }
  pool.for_each(static_cast<int64_t>(shares), [&](int64_t s, int) { memory[s].parted.hand_back(); });
}

}  // namespace dimap::cpu
