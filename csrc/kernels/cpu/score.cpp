#include "score.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "survey.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_score.py.
constexpr struct {
  int64_t shared = int64_t{1} << 23;  // layers of this many weights and more are worked on by all workers together
  int64_t piece = int64_t{1} << 18;   // weights in one task of such a layer
  int key_shift = 14;                 // float32: the first pass parts by key >> key_shift
  int64_t insertion = 24;             // bins of up to this many weights are sorted by insertion
} kTuning;

class Alone final : public Pool {
 public:
  int workers() const override { return 1; }
  void run(const std::function<void(int)>& body) const override { body(0); }
};

struct Piece {  // of a tensor, and where it starts in the layer
  const TensorView* tensor;
  float* scores;
  int64_t offset, n, start;
};

std::vector<Piece> pieces_of(const Problem& problem, std::span<float* const> scores, std::span<const int32_t> tensors,
                             int64_t size) {
  std::vector<Piece> pieces;
  int64_t start = 0;
  for (const int32_t t : tensors) {
    const TensorView& tensor = problem.tensors[t];
    for (int64_t at = 0; at < tensor.numel; at += size) {
      const int64_t n = std::min(size, tensor.numel - at);
      pieces.push_back({&tensor, scores[t], at, n, start + at});
    }
    start += tensor.numel;
  }
  return pieces;
}

template <DType kType>
const storage_t<kType>* weights_of(const Piece& piece) {
  return static_cast<const storage_t<kType>*>(piece.tensor->data) + piece.offset;
}

[[noreturn]] void non_finite(const Problem& problem) {
  check_finite(problem);
  throw std::logic_error("a non-finite weight vanished while it was looked at");
}

// 16-bit types have 32,768 magnitudes: an exact histogram, then a table of scores, no sort.
template <DType kType>
void score_by_table(const Problem& problem, std::span<const Piece> pieces, const Pool& pool) {
  constexpr int kMagnitudes = 1 << 15;
  const auto workers = static_cast<size_t>(pool.workers());
  // Four histograms a worker: runs of equal weights do not wait for one counter.
  std::vector<uint32_t> counts(workers * 4 * kMagnitudes);
  std::vector<int64_t> total(kMagnitudes);
  std::vector<int64_t> flushed(workers);
  std::mutex lock;
  auto flush = [&](size_t worker) {
    const std::lock_guard guard(lock);
    uint32_t* count = counts.data() + worker * 4 * kMagnitudes;
    for (int i = 0; i < 4 * kMagnitudes; ++i) total[i % kMagnitudes] += count[i];
    std::fill(count, count + 4 * kMagnitudes, 0);
    flushed[worker] = 0;
  };
  pool.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t p, int worker) {
    const Piece& piece = pieces[p];
    if ((flushed[worker] += piece.n) > int64_t{1} << 31) flush(static_cast<size_t>(worker)), flushed[worker] = piece.n;
    uint32_t* count = counts.data() + static_cast<size_t>(worker) * 4 * kMagnitudes;
    const uint16_t* w = weights_of<kType>(piece);
    int64_t i = 0;
    for (; i + 4 <= piece.n; i += 4)
      for (int j = 0; j < 4; ++j) ++count[j * kMagnitudes + (w[i + j] & 0x7FFF)];
    for (; i < piece.n; ++i) ++count[w[i] & 0x7FFF];
  });
  for (size_t w = 0; w < workers; ++w) flush(w);
  std::vector<float> table(kMagnitudes);
  double energy = 0;
  for (int m = kMagnitudes - 1; m >= 0; --m) {
    if (total[m] == 0) continue;
    const uint32_t key = key_of<kType>(static_cast<uint16_t>(m));
    if (key >= kNonFinite) non_finite(problem);
    energy += static_cast<double>(total[m]) * squared_value(key);
    table[m] = static_cast<float>(score64(key, energy));
  }
  pool.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t p, int) {
    const Piece& piece = pieces[p];
    const uint16_t* w = weights_of<kType>(piece);
    float* out = piece.scores + piece.offset;
    for (int64_t i = 0; i < piece.n; ++i) out[i] = table[w[i] & 0x7FFF];
  });
}

// Memory of a worker that serves one layer after the other.
class Scratch {
 public:
  template <typename T>
  T* room_for(int64_t n) {
    const auto bytes = static_cast<size_t>(n) * sizeof(T);
    if (bytes > size_) {
      memory_.reset();
      memory_.reset(new std::byte[bytes]);
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<std::byte[]> memory_;
  size_t size_ = 0;
};

template <typename Index>
struct Entry {
  uint32_t key;
  Index index;  // position in the layer
};

// Sorts entries of one bin by key, largest first: they differ in the low kTuning.key_shift bits only.
template <typename Index>
void sort_bin(Entry<Index>* entries, int64_t n, std::vector<Entry<Index>>& spare) {
  if (n <= kTuning.insertion) {
    for (int64_t i = 1; i < n; ++i) {
      const Entry<Index> e = entries[i];
      int64_t j = i;
      for (; j > 0 && entries[j - 1].key < e.key; --j) entries[j] = entries[j - 1];
      entries[j] = e;
    }
    return;
  }
  constexpr int kBits = 7;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  static_assert(2 * kBits >= kTuning.key_shift);
  if (static_cast<int64_t>(spare.size()) < n) spare.resize(static_cast<size_t>(n));
  int64_t low[1 << kBits] = {}, high[1 << kBits] = {};
  for (int64_t i = 0; i < n; ++i) {
    ++low[entries[i].key & kMask];
    ++high[entries[i].key >> kBits & kMask];
  }
  int64_t at_low = 0, at_high = 0;
  for (int d = kMask; d >= 0; --d) {
    at_low += std::exchange(low[d], at_low);
    at_high += std::exchange(high[d], at_high);
  }
  for (int64_t i = 0; i < n; ++i) spare[static_cast<size_t>(low[entries[i].key & kMask]++)] = entries[i];
  for (int64_t i = 0; i < n; ++i) {
    const Entry<Index>& e = spare[static_cast<size_t>(i)];
    entries[high[e.key >> kBits & kMask]++] = e;
  }
}

template <typename Index>
double energy_of(const Entry<Index>* entries, int64_t n) {
  double energy = 0;
  for (int64_t i = 0; i < n; ++i) energy += squared_value(entries[i].key);
  return energy;
}

// Part by the high bits of the key, sort each bin while it is in the cache, and hand the scores back to where the
// weights came from. `Keys` gives a piece's keys: layers may mix types.
template <typename Index>
void score_by_sort(const Problem& problem, std::span<const Piece> pieces, int64_t total, const Pool& pool,
                   Scratch& scratch) {
  constexpr int64_t kBins = int64_t{kKeyEnd} >> kTuning.key_shift;
  const auto parts = static_cast<int64_t>(std::min<size_t>(static_cast<size_t>(pool.workers()), pieces.size()));
  auto for_part = [&](int64_t part, auto&& body) {  // body(key, index) for a part's weights, in order
    const size_t begin = pieces.size() * static_cast<size_t>(part) / static_cast<size_t>(parts);
    const size_t end = pieces.size() * static_cast<size_t>(part + 1) / static_cast<size_t>(parts);
    for (size_t p = begin; p < end; ++p) {
      const Piece& piece = pieces[p];
      auto each = [&]<DType kType>() {
        const auto* w = weights_of<kType>(piece);
        for (int64_t i = 0; i < piece.n; ++i) body(key_of<kType>(w[i]), static_cast<Index>(piece.start + i));
      };
      if (piece.tensor->dtype == DType::kFloat32) each.template operator()<DType::kFloat32>();
      if (piece.tensor->dtype == DType::kBFloat16) each.template operator()<DType::kBFloat16>();
      if (piece.tensor->dtype == DType::kFloat16) each.template operator()<DType::kFloat16>();
    }
  };
  std::vector<Index> at(static_cast<size_t>(parts * kBins));  // counts, then places
  std::vector<uint32_t> largest(static_cast<size_t>(parts)), smallest(static_cast<size_t>(parts), kKeyEnd);
  pool.for_each(parts, [&](int64_t part, int) {
    Index* count = at.data() + part * kBins;
    uint32_t top = 0, bottom = kKeyEnd;
    for_part(part, [&](uint32_t key, Index) {
      ++count[key >> kTuning.key_shift];
      top = std::max(top, key);
      bottom = std::min(bottom, key);
    });
    largest[static_cast<size_t>(part)] = top;
    smallest[static_cast<size_t>(part)] = bottom;
  });
  const uint32_t top = *std::max_element(largest.begin(), largest.end());
  const uint32_t bottom = *std::min_element(smallest.begin(), smallest.end());
  if (top >= kNonFinite) non_finite(problem);
  const int64_t first_bin = top >> kTuning.key_shift, last_bin = bottom >> kTuning.key_shift;  // largest keys first
  const int64_t bins = first_bin - last_bin + 1;
  std::vector<Index> starts(static_cast<size_t>(bins) + 1);
  Index place = 0;
  for (int64_t b = 0; b < bins; ++b) {
    starts[static_cast<size_t>(b)] = place;
    for (int64_t part = 0; part < parts; ++part)
      place += std::exchange(at[static_cast<size_t>(part * kBins + first_bin - b)], place);
  }
  starts[static_cast<size_t>(bins)] = place;

  Entry<Index>* const entries = scratch.room_for<Entry<Index>>(total);
  pool.for_each(parts, [&](int64_t part, int) {
    Index* to = at.data() + part * kBins;
    for_part(part, [&](uint32_t key, Index index) { entries[to[key >> kTuning.key_shift]++] = {key, index}; });
  });

  auto write = [&](Index index, float score) {
    size_t p = 0;
    if (pieces.size() > 1) {
      p = static_cast<size_t>(std::upper_bound(pieces.begin(), pieces.end(), static_cast<int64_t>(index),
                                               [](int64_t i, const Piece& piece) { return i < piece.start; }) -
                              pieces.begin()) -
          1;
    }
    pieces[p].scores[static_cast<int64_t>(index) - pieces[p].start + pieces[p].offset] = score;
  };
  // One flat output where the layer is one tensor: the usual case.
  const bool flat =
      std::all_of(pieces.begin(), pieces.end(), [&](const Piece& piece) { return piece.tensor == pieces[0].tensor; });
  float* const out = pieces[0].scores;

  // Tasks of whole bins, about a piece each.
  std::vector<int64_t> tasks{0};
  for (int64_t b = 1; b < bins; ++b)
    if (static_cast<int64_t>(starts[static_cast<size_t>(b)]) >=
        static_cast<int64_t>(starts[static_cast<size_t>(tasks.back())]) + kTuning.piece)
      tasks.push_back(b);
  tasks.push_back(bins);
  std::vector<double> energy(static_cast<size_t>(bins));
  const auto count = static_cast<int64_t>(tasks.size()) - 1;
  std::vector<std::vector<Entry<Index>>> spares(static_cast<size_t>(pool.workers()));
  auto sort_task = [&](int64_t task, int worker) {
    for (int64_t b = tasks[static_cast<size_t>(task)]; b < tasks[static_cast<size_t>(task) + 1]; ++b) {
      Entry<Index>* begin = entries + starts[static_cast<size_t>(b)];
      const auto n = static_cast<int64_t>(starts[static_cast<size_t>(b) + 1] - starts[static_cast<size_t>(b)]);
      if (n == 0) continue;
      sort_bin(begin, n, spares[static_cast<size_t>(worker)]);
      energy[static_cast<size_t>(b)] = energy_of(begin, n);
    }
  };
  auto score_task = [&](int64_t task, double before) {
    for (int64_t b = tasks[static_cast<size_t>(task)]; b < tasks[static_cast<size_t>(task) + 1]; ++b) {
      const Entry<Index>* entry = entries + starts[static_cast<size_t>(b)];
      const Entry<Index>* const end = entries + starts[static_cast<size_t>(b) + 1];
      double inside = 0;
      while (entry < end) {  // equal magnitudes share their sum
        const uint32_t key = entry->key;
        const double square = squared_value(key);
        const Entry<Index>* group = entry;
        for (; group < end && group->key == key; ++group) inside += square;
        const auto score = key == 0 ? 0.0f : static_cast<float>(square / (before + inside));
        if (flat)
          for (; entry < group; ++entry) out[entry->index] = score;
        else
          for (; entry < group; ++entry) write(entry->index, score);
      }
      before += energy[static_cast<size_t>(b)];
    }
    return before;
  };
  if (pool.workers() == 1) {
    double before = 0;
    for (int64_t task = 0; task < count; ++task) {
      sort_task(task, 0);
      before = score_task(task, before);
    }
    return;
  }
  pool.for_each(count, sort_task);
  std::vector<double> before(static_cast<size_t>(count));
  double sum = 0;
  for (int64_t task = 0; task < count; ++task) {
    before[static_cast<size_t>(task)] = sum;
    for (int64_t b = tasks[static_cast<size_t>(task)]; b < tasks[static_cast<size_t>(task) + 1]; ++b)
      sum += energy[static_cast<size_t>(b)];
  }
  pool.for_each(count, [&](int64_t task, int) { score_task(task, before[static_cast<size_t>(task)]); });
}

void score_layer(const Problem& problem, std::span<float* const> scores, std::span<const int32_t> tensors,
                 const Pool& pool, Scratch& scratch) {
  int64_t total = 0;
  bool same = true;
  for (const int32_t t : tensors) {
    total += problem.tensors[t].numel;
    same &= problem.tensors[t].dtype == problem.tensors[tensors[0]].dtype;
  }
  if (total == 0) return;
  const DType dtype = problem.tensors[tensors[0]].dtype;
  const std::vector<Piece> pieces = pieces_of(problem, scores, tensors, kTuning.piece);
  if (same && dtype == DType::kBFloat16)
    score_by_table<DType::kBFloat16>(problem, pieces, pool);
  else if (same && dtype == DType::kFloat16)
    score_by_table<DType::kFloat16>(problem, pieces, pool);
  else if (total < int64_t{1} << 32)
    score_by_sort<uint32_t>(problem, pieces, total, pool, scratch);
  else
    score_by_sort<uint64_t>(problem, pieces, total, pool, scratch);
}

}  // namespace

void score(const Problem& problem, std::span<float* const> scores, const Pool& pool) {
  std::vector<std::vector<int32_t>> tensors(problem.layers());
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    tensors[problem.tensors[t].layer].push_back(static_cast<int32_t>(t));
  std::vector<int32_t> order(problem.layers());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return problem.layer_total[a] > problem.layer_total[b]; });
  std::vector<Scratch> scratch(static_cast<size_t>(pool.workers()));
  size_t first = 0;
  for (; first < order.size() && problem.layer_total[order[first]] >= kTuning.shared; ++first)
    score_layer(problem, scores, tensors[order[first]], pool, scratch[0]);
  pool.for_each(static_cast<int64_t>(order.size() - first), [&](int64_t i, int worker) {
    score_layer(problem, scores, tensors[order[first + static_cast<size_t>(i)]], Alone(), scratch[worker]);
  });
}

}  // namespace dimap::cpu
