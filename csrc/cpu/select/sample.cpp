#include "cpu/select/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/select/chunks.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  int64_t run = 128;  // bytes of neighbouring weights read at a time: the two cache lines that memory gives at once
  int64_t ratio_alone = 16;  // one run in this many, where a module has one layer: its cut is a quantile of that layer
  int64_t ratio = 56;        // one run in this many elsewhere, where the layer is neither small
  int64_t least = 8192;      // nor
  int64_t least_module = 1 << 15;   // (of layers that are looked at closely when they are read: their module needs so
  int64_t least_close = 256;        // many in its sample, and each of them this many)
  int64_t most = int64_t{1} << 18;  // large: weights in the sample of a layer
  int64_t ahead = 24;               // runs between asking memory for one and reading it
  int64_t file_run = int64_t{1} << 16;  // bytes of a file read at a time,
  int64_t file_ratio = 96;              // one run in this many, where a layer then has neither fewer
  int64_t file_least = 12;              // nor
  int64_t file_most = 32;               // more;
  int64_t file_keys = 4096;  // so many weights of each are looked at, since their neighbours tell little more,
  int64_t file_line = 16;    // so many together
  int64_t fine_from = 4096;  // weights in a sample of which there are enough to fill narrow bins
  int coarse = 3;            // log2 of how many go together where there are not
} kTuning;

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Memory of a worker.
struct Scratch {
  Cells cells;
  std::vector<uint32_t> keys;
  std::vector<char> runs;
};

// Where the runs of a tensor begin: one in each stretch of `ratio` runs, at random.
class Places {
 public:
  Places(int32_t tensor, int64_t numel, int64_t run, int64_t ratio)
      : seed_(mix(static_cast<uint64_t>(tensor) + 1)), numel_(numel), run_(run), ratio_(ratio) {}
  int64_t count() const { return (numel_ + run_ * ratio_ - 1) / (run_ * ratio_); }
  // A stretch cut short by the tensor's end is taken with the probability that keeps the sample unbiased: its run may
  // begin beyond the end.
  int64_t operator[](int64_t i) const {
    const uint64_t draw = mix(seed_ ^ static_cast<uint64_t>(i)) >> 32;
    return (i * ratio_ + static_cast<int64_t>(draw * static_cast<uint64_t>(ratio_) >> 32)) * run_;
  }

 private:
  uint64_t seed_;
  int64_t numel_, run_, ratio_;
};

// Notes the keys and the energy of a run.
template <DType kType>
DIMAP_HD void take_run(const storage_t<kType>* weights, int64_t n, uint32_t* keys, Histogram& histogram) {
  constexpr int64_t kSums = 8;  // that do not wait for each other
  double sums[kSums] = {};
  int64_t i = 0;
  const auto add = [&](double& sum) {
    keys[i] = key_of<kType>(weights[i]);
    const double value = std::bit_cast<float>(keys[i++]);
    sum += value * value;
  };
  while (i + kSums <= n)
    for (double& sum : sums) add(sum);
  while (i < n) add(sums[0]);
  const double energy = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  histogram.energy += energy;
  histogram.energy_squares += energy * energy;
  ++histogram.runs;
}

// Counts the keys; run: of a file, and how the weights above the likely cut are spread over runs of so many, or 0.
void count_keys(Scratch& scratch, double share, int64_t run, Histogram& histogram) {
  const std::vector<uint32_t>& keys = scratch.keys;
  const auto [low, high] = scratch.cells.add_keys(keys, histogram.coarse);
  if (run) {
    auto left = static_cast<int64_t>(share * static_cast<double>(keys.size()));
    uint32_t bin = high;
    while (bin > low && (left -= scratch.cells.count(bin)) > 0) --bin;
    const uint32_t cut = histogram.first_of(bin);
    for (size_t at = 0; at < keys.size(); at += static_cast<size_t>(run)) {
      const auto begin = keys.begin() + static_cast<int64_t>(at);
      const auto end = begin + std::min(run, static_cast<int64_t>(keys.size() - at));
      const int64_t above = std::count_if(begin, end, [&](uint32_t key) { return key >= cut; });
      histogram.above += above;
      histogram.above_squares += above * above;
    }
  }
  histogram.bins = scratch.cells.move_out(low, high);
  if (histogram.coarse == 0) return;
  // Of few and different weights the rests are a multiple of their count too often: they must not be taken for equal.
  const auto likely = static_cast<int64_t>(Sketch::kAtomShare * static_cast<double>(keys.size()));
  for (Histogram::Bin& bin : histogram.bins) {
    if (bin.count <= std::max<int64_t>(likely, 1) || bin.rest % bin.count != 0) continue;
    const uint32_t mean = histogram.first_of(bin.bin) + static_cast<uint32_t>(bin.rest / bin.count);
    if (std::ranges::count(keys, mean) != bin.count) ++bin.rest;
  }
}

// A layer's histogram from its tensors that lie in memory. layers: in its module; close: it will be looked at closely.
void sample_memory(const Problem& problem, int32_t layer, int32_t layers, bool close, std::span<const int32_t> tensors,
                   Scratch& scratch, Histogram& histogram) {
  const int64_t total = problem.layer_total[layer];
  const bool alone = layers == 1;
  int64_t least = close && alone ? kTuning.least_close : kTuning.least;
  if (close && !alone) least = std::clamp(kTuning.least_module / layers, kTuning.least_close, kTuning.least);
  const int64_t wanted =
      std::clamp(total / (alone && !close ? kTuning.ratio_alone : kTuning.ratio), least, kTuning.most);
  if (close && wanted < kTuning.fine_from) histogram.coarse = kTuning.coarse;
  const int64_t ratio = std::max<int64_t>(1, total / wanted);
  for (const int32_t t : tensors) {
    const TensorView& tensor = problem.tensors[t];
    for_type(tensor.dtype, [&]<DType kType>() {
      using T = storage_t<kType>;
      constexpr int64_t kRun = kTuning.run / static_cast<int64_t>(sizeof(T));
      const auto* weights = static_cast<const T*>(tensor.data);
      const Places places(t, tensor.numel, kRun, ratio);
      // First the runs are gathered, by a loop so short that many are under way at a time, since each costs a walk
      // through the tables of pages; then what was gathered is looked at.
      const int64_t whole = tensor.numel / (kRun * ratio);
      scratch.runs.resize(static_cast<size_t>(whole * kTuning.run));
      T* runs = reinterpret_cast<T*>(scratch.runs.data());
      for (int64_t i = 0; i < whole; ++i) {
        if (i + kTuning.ahead < whole)
          for (int64_t line = 0; line < kRun; line += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(weights + places[i + kTuning.ahead] + line);
        std::memcpy(runs + i * kRun, weights + places[i], kTuning.run);
      }
      const size_t at = scratch.keys.size();
      scratch.keys.resize(at + static_cast<size_t>((whole + 1) * kRun));
      uint32_t* keys = scratch.keys.data() + at;
      for (int64_t i = 0; i < whole; ++i, keys += kRun) take_run<kType>(runs + i * kRun, kRun, keys, histogram);
      const int64_t begin = places[whole], left = std::min(kRun, tensor.numel - begin);
      if (left > 0) take_run<kType>(weights + begin, left, keys, histogram);
      scratch.keys.resize(at + static_cast<size_t>(whole * kRun + std::max<int64_t>(0, left)));
    });
  }
}

// ... and in files. Several ranks take the tensors in turns. Returns how many weights of a run are looked at.
int64_t sample_files(const Problem& problem, int32_t layer, std::span<const int32_t> tensors, Loader& loader,
                     int worker, Scratch& scratch, Histogram& histogram) {
  const int64_t kept = kTuning.file_keys;
  for (const int32_t t : tensors) {
    const TensorView& tensor = problem.tensors[t];
    const int64_t run = kTuning.file_run / size_of(tensor.dtype);
    if (t % problem.ranks != problem.rank) continue;
    const int64_t runs = (problem.layer_total[layer] + run - 1) / run;
    const int64_t wanted = std::clamp(runs / kTuning.file_ratio, kTuning.file_least, kTuning.file_most);
    const Places places(t, tensor.numel, run, std::max<int64_t>(1, runs / wanted));
    for (int64_t i = 0; i < places.count(); ++i) {
      const int64_t begin = places[i];
      if (begin >= tensor.numel) continue;
      const int64_t n = std::min(run, tensor.numel - begin);
      const void* weights = loader.load(t, begin, n, worker);
      for_type(tensor.dtype, [&]<DType kType>() {
        using T = storage_t<kType>;
        scratch.runs.resize(static_cast<size_t>(n) * sizeof(T));
        T* looked_at = reinterpret_cast<T*>(scratch.runs.data());
        T* end = looked_at;
        for (int64_t line = 0; line < n; line += run / kept * kTuning.file_line)
          end = std::copy_n(static_cast<const T*>(weights) + line, std::min(kTuning.file_line, n - line), end);
        const size_t at = scratch.keys.size();
        scratch.keys.resize(at + static_cast<size_t>(end - looked_at));
        take_run<kType>(looked_at, end - looked_at, scratch.keys.data() + at, histogram);
      });
    }
  }
  return kept;
}

}  // namespace

std::vector<Sketch> sample_layers(const Problem& problem, std::span<const Guess> guesses, Loader& loader,
                                  const Pool& pool, const Exchange* exchange) {
  std::vector<std::vector<int32_t>> tensors(problem.layers());
  std::vector<int32_t> layers(problem.modules());
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    tensors[problem.tensors[t].layer].push_back(static_cast<int32_t>(t));
  for (const int32_t module : problem.layer_module) ++layers[module];
  std::vector<Histogram> histograms(problem.layers());
  std::vector<Sketch> sketches(problem.layers());
  std::vector<Scratch> scratch(static_cast<size_t>(pool.workers()));
  const auto look = [&](int32_t layer, int worker) {
    const int32_t module = problem.layer_module[layer];
    Histogram& histogram = histograms[layer];
    if (tensors[layer].empty() || problem.keep[module] == 0) return;
    Scratch& mine = scratch[worker];
    mine.keys.clear();
    int64_t run = 0;
    if (problem.tensors[tensors[layer][0]].file < 0)
      sample_memory(problem, layer, layers[module], guesses[layer].close, tensors[layer], mine, histogram);
    else
      run = sample_files(problem, layer, tensors[layer], loader, worker, mine, histogram);
    const double share = static_cast<double>(problem.keep[module]) / static_cast<double>(problem.module_total[module]);
    if (!mine.keys.empty()) count_keys(mine, share, run, histogram);
  };
  const auto sketch = [&](size_t l) {
    sketches[l] = sketch_of(std::exchange(histograms[l], {}), problem.layer_total[l], false);
  };
  pool.for_each(static_cast<int64_t>(problem.layers()), [&](int64_t l, int worker) {
    look(static_cast<int32_t>(l), worker);
    if (!exchange) sketch(static_cast<size_t>(l));  // at once, so that the next histogram takes the same memory
  });
  if (exchange) {
    add_up(histograms, *exchange);
    for (size_t l = 0; l < sketches.size(); ++l) sketch(l);
  }
  return sketches;
}

}  // namespace dimap::cpu
