#include "cpu/select/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "cpu/select/chunks.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  int64_t run = 16;          // neighbouring weights read at a time: a cache line of float32
  int64_t ratio_alone = 16;  // one run in this many, where a module has one layer: its cut is a quantile of that layer
  int64_t ratio = 48;        // one run in this many elsewhere, where the layer is neither small
  int64_t least = 8192;      // nor
  int64_t most = int64_t{1} << 18;  // large: weights in the sample of a layer
  int64_t ahead = 12;               // runs between asking memory for one and reading it
} kTuning;

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Scratch {
  std::vector<uint32_t> count = std::vector<uint32_t>(Sketch::kBins);
  std::vector<uint32_t> keys;
};

struct Moments {  // of the energy of a run
  double sum = 0, sum_of_squares = 0;
  int64_t runs = 0;
};

template <DType kType>
void sample_tensor(const TensorView& tensor, uint64_t seed, int64_t ratio, std::vector<uint32_t>& keys,
                   Moments& moments) {
  const auto* weights = static_cast<const storage_t<kType>*>(tensor.data);
  const int64_t stratum = kTuning.run * ratio;
  const auto place = [&](int64_t i) {  // where the run of a stratum starts
    const uint64_t draw = ratio == 1 ? 0 : mix(seed ^ static_cast<uint64_t>(i)) % static_cast<uint64_t>(ratio);
    return i * stratum + static_cast<int64_t>(draw) * kTuning.run;
  };
  const int64_t strata = (tensor.numel + stratum - 1) / stratum;
  for (int64_t i = 0; i < strata; ++i) {
    if (i + kTuning.ahead < strata) __builtin_prefetch(weights + place(i + kTuning.ahead));
    const int64_t begin = place(i);
    // A stratum cut short by the tensor's end is taken with the probability that keeps the sample unbiased.
    if (begin >= tensor.numel) continue;
    const int64_t n = std::min(kTuning.run, tensor.numel - begin);
    const size_t at = keys.size();
    keys.resize(at + static_cast<size_t>(n));
    double energy = 0;
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t key = key_of<kType>(weights[begin + j]);
      keys[at + static_cast<size_t>(j)] = key;
      const double value = std::bit_cast<float>(key);
      energy += value * value;
    }
    moments.sum += energy;
    moments.sum_of_squares += energy * energy;
    ++moments.runs;
  }
}

// The one key of a bin, or Sketch::kMixed.
uint32_t only_key(const std::vector<uint32_t>& keys, uint32_t bin) {
  uint32_t only = Sketch::kMixed;
  for (const uint32_t key : keys) {
    if (Sketch::bin_of(key) != bin) continue;
    if (only != Sketch::kMixed && only != key) return Sketch::kMixed;
    only = key;
  }
  return only;
}

Sketch sketch_layer(const Problem& problem, int32_t layer, bool alone, const std::vector<int32_t>& tensors,
                    Scratch& scratch) {
  const int64_t total = problem.layer_total[layer];
  const int64_t wanted = std::clamp(total / (alone ? kTuning.ratio_alone : kTuning.ratio), kTuning.least, kTuning.most);
  const int64_t ratio = std::max<int64_t>(1, total / wanted);
  std::vector<uint32_t>& keys = scratch.keys;
  keys.clear();
  Moments moments;
  for (const int32_t t : tensors) {
    const TensorView& tensor = problem.tensors[t];
    const uint64_t seed = mix(static_cast<uint64_t>(t) + 1);
    for_type(tensor.dtype, [&]<DType kType>() { sample_tensor<kType>(tensor, seed, ratio, keys, moments); });
  }
  uint32_t top = 0, bottom = kKeyEnd - 1;
  for (const uint32_t key : keys) {
    ++scratch.count[Sketch::bin_of(key)];
    top = std::max(top, key);
    bottom = std::min(bottom, key);
  }
  Sketch sketch;
  sketch.total = static_cast<double>(total);
  sketch.scale = keys.empty() ? 1 : sketch.total / static_cast<double>(keys.size());
  if (ratio > 1 && moments.sum > 0) {
    const double mean = moments.sum / static_cast<double>(moments.runs);
    const double spread =
        std::max(0.0, moments.sum_of_squares / moments.sum - mean);  // variance of a run over its mean
    sketch.deviation = std::sqrt(spread / moments.sum);
  }
  for (int64_t b = Sketch::bin_of(top); b >= Sketch::bin_of(bottom); --b) {
    const auto bin = static_cast<uint32_t>(b);
    const uint32_t count = std::exchange(scratch.count[bin], 0);
    if (count == 0) continue;
    const bool heavy = count > Sketch::kAtomShare * static_cast<double>(keys.size());
    const uint32_t only = bin == 0 ? 0 : heavy ? only_key(keys, bin) : Sketch::kMixed;
    const uint32_t middle = std::min((Sketch::first_of(bin) + Sketch::first_of(bin + 1)) / 2, kNonFinite - 1);
    sketch.add(bin, only, count * sketch.scale, squared_value(only != Sketch::kMixed ? only : middle));
  }
  return sketch;
}

}  // namespace

std::vector<Sketch> sample_layers(const Problem& problem, const Pool& pool) {
  std::vector<std::vector<int32_t>> tensors(problem.layers());
  std::vector<int32_t> layers(problem.modules());
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    tensors[problem.tensors[t].layer].push_back(static_cast<int32_t>(t));
  for (const int32_t module : problem.layer_module) ++layers[module];
  std::vector<Sketch> sketches(problem.layers());
  std::vector<Scratch> scratch(static_cast<size_t>(pool.workers()));
  pool.for_each(static_cast<int64_t>(problem.layers()), [&](int64_t l, int worker) {
    const bool alone = layers[problem.layer_module[l]] == 1;
    sketches[l] = sketch_layer(problem, static_cast<int32_t>(l), alone, tensors[l], scratch[worker]);
  });
  return sketches;
}

}  // namespace dimap::cpu
