#include "cpu/select/count.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/select/chunks.h"

namespace dimap::cpu {
namespace {

// Layers of so many weights and more are counted by all workers together,
constexpr int64_t kTogether = int64_t{1} << 20;

// ... and of so few key by key: a counter's tables have 2^16 cells to look through.
constexpr int64_t kFew = int64_t{1} << 15;

// Histograms of the weights' bits, one for each type of storage, and of their keys.
class Counter {
 public:
  template <DType kType>
  void add(const storage_t<kType>* weights, int64_t n) {
    while (n > 0) {
      if (room_ == 0 || type_ != kType) flush();
      type_ = kType;
      const int64_t now = std::min(n, room_);
      add_some<kType>(weights, now);
      weights += now, n -= now, room_ -= now;
    }
  }

  // What was added since the last time, by this counter and the others.
  Cells& cells(std::span<Counter> others = {}) {
    flush();
    for (Counter& other : others) other.flush(), cells_.take(other.cells_);
    return cells_;
  }

 private:
  static constexpr uint32_t kUpper = kKeyEnd >> Sketch::kShift;  // cells by a float32's upper bits; denormals follow
  static constexpr int64_t kRoom = int64_t{1} << 23;  // weights that fit a cell: rests below 2^17 sum to below 2^40

  // Neighbours go to different tables: where they are equal, one need not wait for the other. A cell has its count in
  // the upper 24 bits; float32 is binned by its upper bits and sums the others below, 16-bit types have a cell a value.
  template <DType kType>
  void add_some(const storage_t<kType>* weights, int64_t n) {
    constexpr uint64_t kOne = uint64_t{1} << 40;
    uint64_t *even = even_.data(), *odd = odd_.data();
    const auto count = [](uint64_t* cells, storage_t<kType> weight) {
      if constexpr (kType == DType::kFloat32) {
        const uint32_t key = key_of<kType>(weight);
        if (key - 1 < 0x7FFFFFu) [[unlikely]] {
          const uint32_t bin = Sketch::bin_of(key);
          cells[kUpper + bin] += kOne | (key - Sketch::first_of(bin));
        } else {
          cells[key >> Sketch::kShift] += kOne | (key & ((1u << Sketch::kShift) - 1));
        }
      } else {
        cells[weight & 0x7FFFu] += kOne;
      }
    };
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      count(even, weights[i]), count(odd, weights[i + 1]);
      count(even, weights[i + 2]), count(odd, weights[i + 3]);
    }
    for (; i < n; ++i) count(even, weights[i]);
  }

  void flush() {
    if (room_ != kRoom) for_type(type_, [&]<DType kType>() { flush_cells<kType>(); });
    room_ = kRoom;
  }

  template <DType kType>
  void flush_cells() {
    for (uint32_t c = 0; c < even_.size(); ++c) {
      for (uint64_t* table : {even_.data(), odd_.data()}) {
        const uint64_t cell = std::exchange(table[c], 0);
        if (cell == 0) continue;
        const uint64_t count = cell >> 40, rest = cell & ((uint64_t{1} << 40) - 1);
        uint32_t b = c - kUpper, above = 0;  // bin, and how far in it a 16-bit value is
        if constexpr (kType == DType::kFloat32) {
          if (c < kUpper) b = Sketch::bin_of(c << Sketch::kShift);
        } else {
          const uint32_t key = key_of<kType>(static_cast<storage_t<kType>>(c));
          b = Sketch::bin_of(key);
          above = key - Sketch::first_of(b);
        }
        cells_.add(b, static_cast<int64_t>(count), static_cast<int64_t>(rest + count * above));
      }
    }
  }

  DType type_ = DType::kFloat32;
  int64_t room_ = kRoom;
  std::vector<uint64_t> even_ = std::vector<uint64_t>(0x8000), odd_ = std::vector<uint64_t>(0x8000);
  Cells cells_;
};

}  // namespace

void count_layers(const Problem& problem, std::span<const uint8_t> wanted, Loader& loader, const Pool& pool,
                  const Exchange* exchange, std::span<Sketch> sketches) {
  const std::vector<Chunk> chunks = chunks_of(problem);
  std::vector<std::vector<int32_t>> chunks_of_layer(problem.layers());
  int64_t bytes = 0;
  for (size_t c = 0; c < chunks.size(); ++c) {
    if (!chunks[c].mine || !wanted[chunks[c].layer]) continue;
    chunks_of_layer[chunks[c].layer].push_back(static_cast<int32_t>(c));
    bytes += chunks[c].n * size_of(problem.tensors[chunks[c].tensor].dtype);
  }
  pool.begin("counting", bytes);
  std::vector<Counter> counters(static_cast<size_t>(pool.workers()));
  std::vector<Histogram> histograms(problem.layers());
  struct Few {
    Cells cells;
    std::vector<uint32_t> keys;
  };
  std::vector<Few> few(counters.size());
  const auto add = [&](int32_t c, int worker) {
    const Chunk& chunk = chunks[c];
    const DType dtype = problem.tensors[chunk.tensor].dtype;
    const void* weights = loader.load(chunk, worker);
    for_type(dtype, [&]<DType kType>() {
      counters[worker].add<kType>(static_cast<const storage_t<kType>*>(weights), chunk.n);
    });
    pool.advance(chunk.n * size_of(dtype));
  };
  const auto count_few = [&](size_t l, int worker) {
    auto& [cells, keys] = few[worker];
    keys.clear();
    for (const int32_t c : chunks_of_layer[l]) {
      const DType dtype = problem.tensors[chunks[c].tensor].dtype;
      for_type(dtype, [&]<DType kType>() {
        const auto* weights = static_cast<const storage_t<kType>*>(loader.load(chunks[c], worker));
        for (int64_t i = 0; i < chunks[c].n; ++i) keys.push_back(key_of<kType>(weights[i]));
      });
      pool.advance(chunks[c].n * size_of(dtype));
    }
    if (keys.empty()) return;
    const auto [low, high] = cells.add_keys(keys);
    histograms[l].bins = cells.move_out(low, high);
  };
  const auto together = [&](size_t l) { return problem.layer_total[l] >= kTogether; };
  pool.for_each(static_cast<int64_t>(problem.layers()), [&](int64_t l, int worker) {
    if (!wanted[l] || together(l)) return;
    if (problem.layer_total[l] <= kFew) return count_few(static_cast<size_t>(l), worker);
    for (const int32_t c : chunks_of_layer[l]) add(c, worker);
    histograms[l].bins = counters[worker].cells().move_out(0, Sketch::kBins - 1);
  });
  for (size_t l = 0; l < problem.layers(); ++l) {
    if (!wanted[l] || !together(l)) continue;
    const std::vector<int32_t>& mine = chunks_of_layer[l];
    pool.for_each(static_cast<int64_t>(mine.size()), [&](int64_t i, int worker) { add(mine[i], worker); });
    histograms[l].bins = counters[0].cells(std::span(counters).subspan(1)).move_out(0, Sketch::kBins - 1);
  }
  if (exchange) add_up(histograms, *exchange);
  for (size_t l = 0; l < problem.layers(); ++l)
    if (wanted[l]) sketches[l] = sketch_of(histograms[l], problem.layer_total[l], true);
}

}  // namespace dimap::cpu
