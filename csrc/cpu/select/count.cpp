#include "cpu/select/count.h"

#include <algorithm>
#include <utility>

#include "cpu/select/chunks.h"

namespace dimap::cpu {
namespace {

// Layers of so many weights and more are counted by all workers together.
constexpr int64_t kTogether = int64_t{1} << 20;

constexpr int64_t kPiece = int64_t{1} << 18;  // weights that a worker takes at a time

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

  void take(Counter& other) {
    flush(), other.flush();
    for (int b = 0; b < Sketch::kBins; ++b) {
      Bin& bin = other.bins_[static_cast<size_t>(b)];
      bins_[static_cast<size_t>(b)].count += std::exchange(bin.count, 0);
      bins_[static_cast<size_t>(b)].rest += std::exchange(bin.rest, 0);
    }
  }

  // The sketch of all that was added since the last one.
  Sketch sketch(int64_t total) {
    flush();
    Sketch sketch;
    sketch.exact = true;
    sketch.total = static_cast<double>(total);
    sketch.deviation = 2e-5;  // of the squares in a bin around that of their mean, at most, over sigmas
    for (uint32_t b = Sketch::kBins; b-- > 0;) {
      const Bin bin = std::exchange(bins_[b], {});
      const uint32_t first = Sketch::first_of(b);
      if (bin.count == 0 || first >= kNonFinite) continue;  // reading will find what is not finite
      const uint32_t mean = first + static_cast<uint32_t>(bin.rest / bin.count);
      const bool heavy = static_cast<double>(bin.count) > Sketch::kAtomShare * sketch.total;
      const bool equal = (heavy || b == 0) && bin.rest % bin.count == 0;  // or nearly so: it is a guess
      sketch.add(b, equal ? mean : Sketch::kMixed, static_cast<double>(bin.count), squared_value(mean));
    }
    return sketch;
  }

 private:
  static constexpr uint32_t kUpper = kKeyEnd >> Sketch::kShift;  // cells by a float32's upper bits; denormals follow
  static constexpr int64_t kRoom = int64_t{1} << 23;  // weights that fit a cell: rests below 2^17 sum to below 2^40

  struct Bin {
    uint64_t count = 0;
    uint64_t rest = 0;  // sum of the keys' lower bits
  };

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
        bins_[b].count += count;
        bins_[b].rest += rest + count * above;
      }
    }
  }

  DType type_ = DType::kFloat32;
  int64_t room_ = kRoom;
  std::vector<uint64_t> even_ = std::vector<uint64_t>(0x8000), odd_ = std::vector<uint64_t>(0x8000);
  std::vector<Bin> bins_ = std::vector<Bin>(Sketch::kBins);
};

void add(Counter& counter, const TensorView& tensor, int64_t begin, int64_t n) {
  for_type(tensor.dtype,
           [&]<DType kType>() { counter.add<kType>(static_cast<const storage_t<kType>*>(tensor.data) + begin, n); });
}

}  // namespace

void count_layers(const Problem& problem, std::span<const uint8_t> wanted, const Pool& pool,
                  std::span<Sketch> sketches) {
  std::vector<std::vector<int32_t>> tensors(problem.layers());
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    tensors[problem.tensors[t].layer].push_back(static_cast<int32_t>(t));
  std::vector<Counter> counters(static_cast<size_t>(pool.workers()));
  const auto together = [&](size_t l) { return problem.layer_total[l] >= kTogether; };
  pool.for_each(static_cast<int64_t>(problem.layers()), [&](int64_t l, int worker) {
    if (!wanted[l] || together(l)) return;
    for (const int32_t t : tensors[l]) add(counters[worker], problem.tensors[t], 0, problem.tensors[t].numel);
    sketches[l] = counters[worker].sketch(problem.layer_total[l]);
  });
  for (size_t l = 0; l < problem.layers(); ++l) {
    if (!wanted[l] || !together(l)) continue;
    for (const int32_t t : tensors[l]) {
      const TensorView& tensor = problem.tensors[t];
      pool.for_each((tensor.numel + kPiece - 1) / kPiece, [&](int64_t p, int worker) {
        add(counters[worker], tensor, p * kPiece, std::min(kPiece, tensor.numel - p * kPiece));
      });
    }
    for (size_t w = 1; w < counters.size(); ++w) counters[0].take(counters[w]);
    sketches[l] = counters[0].sketch(problem.layer_total[l]);
  }
}

}  // namespace dimap::cpu
