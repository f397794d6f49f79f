#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "chunks.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  int64_t run = 16;          // neighbouring weights read at a time: a cache line of float32
  int64_t ratio_alone = 16;  // one run in this many, where a module has one layer: its cut is a quantile of that layer
  int64_t ratio = 48;        // one run in this many elsewhere, where the layer is neither small
  int64_t least = 8192;      // nor
  int64_t most = int64_t{1} << 18;  // large: weights in the sample of a layer
  double sigmas = 3.5;              // half width of a bracket
  double clustering = 1.5;          // neighbours are alike: variance of a count over that of independent draws
  double atom_share = 1.0 / 32;     // a single magnitude with more of its layer than this is counted, not set aside
  int64_t ahead = 12;               // runs between asking memory for one and reading it
} kTuning;

constexpr int kShift = 17;  // histogram bins of the sample: 64 to an octave
constexpr int kBins = static_cast<int>(kKeyEnd >> kShift);
constexpr uint32_t kMixed = 0xFFFFFFFFu;

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct Step {  // a nonempty bin of the sample's histogram, scaled up to the layer
  int bin;
  uint32_t only;        // the one key in it, or kMixed
  double count, above;  // of weights in it, and in all larger ones
  double low, high;     // scores at its two edges
};

struct Sketch {
  std::vector<Step> steps;  // largest magnitudes first
  double scale = 1;         // weights that one sampled weight stands for
  double deviation = 0;     // of the energy, relative
  double total = 0;
};

float value_of(uint32_t key) {
  float value;
  std::memcpy(&value, &key, 4);
  return value;
}

struct Scratch {
  std::vector<uint32_t> count = std::vector<uint32_t>(kBins);
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
      const double value = value_of(key);
      energy += value * value;
    }
    moments.sum += energy;
    moments.sum_of_squares += energy * energy;
    ++moments.runs;
  }
}

// The one key of a bin, or kMixed.
uint32_t only_key(const std::vector<uint32_t>& keys, uint32_t bin) {
  uint32_t only = kMixed;
  for (const uint32_t key : keys) {
    if (key >> kShift != bin) continue;
    if (only != kMixed && only != key) return kMixed;
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
  uint32_t top = 0, bottom = kKeyEnd;
  for (const uint32_t key : keys) {
    ++scratch.count[key >> kShift];
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
  double above = 0, energy_above = 0;
  for (int64_t bin = top >> kShift; bin >= bottom >> kShift; --bin) {
    const uint32_t count = std::exchange(scratch.count[static_cast<size_t>(bin)], 0);
    if (count == 0) continue;
    const auto first = static_cast<uint32_t>(bin) << kShift;
    const bool heavy = count > kTuning.atom_share * static_cast<double>(keys.size());
    Step step;
    step.bin = static_cast<int>(bin);
    step.only = heavy || first == 0 ? only_key(keys, static_cast<uint32_t>(bin)) : kMixed;
    step.count = count * sketch.scale;
    step.above = above;
    const double lower = value_of(first);
    const double upper = value_of(std::min(first + (1u << kShift), kNonFinite - 1));
    const double inside = step.only != kMixed ? value_of(step.only) : (lower + upper) / 2;
    step.high = energy_above > 0 ? std::min(1.0, upper * upper / energy_above) : 1.0;
    above += step.count;
    energy_above += step.count * inside * inside;
    step.low = energy_above > 0 ? std::min(step.high, lower * lower / energy_above) : 0;
    sketch.steps.push_back(step);
  }
  return sketch;
}

struct Crossing {
  double key, kept;  // where the score falls to the threshold, and how many weights are above
  double density;    // weights per unit of ln(magnitude) there
  const Step* step;  // the bin that holds the crossing, if any
};

Crossing cross(const Sketch& sketch, double threshold) {
  const auto& steps = sketch.steps;
  const auto it = std::partition_point(steps.begin(), steps.end(), [&](const Step& s) { return s.low >= threshold; });
  if (it == steps.end()) return {0, sketch.total, 0, nullptr};
  const double width = static_cast<double>(uint32_t{1} << kShift);
  const double first = static_cast<double>(it->bin) * width;
  double part = 0;  // of the bin that lies above the crossing
  if (threshold < it->high && it->low < it->high && it->low > 0)
    part = std::log(it->high / threshold) / std::log(it->high / it->low);
  else if (threshold < it->high)
    part = 1 - (threshold - it->low) / (it->high - it->low);
  part = std::clamp(part, 0.0, 1.0);
  return {first + (1 - part) * width, it->above + part * it->count, it->count * 64 / std::log(2.0), &*it};
}

double threshold_for(const std::vector<const Sketch*>& sketches, double keep) {
  double low = std::log(1e-30), high = 0;  // of ln(threshold)
  for (int i = 0; i < 26; ++i) {
    const double middle = (low + high) / 2;
    double kept = 0;
    for (const Sketch* sketch : sketches) kept += cross(*sketch, std::exp(middle)).kept;
    (kept >= keep ? low : high) = middle;
  }
  return std::exp(low);
}

// ... as a magnitude key times a factor, kept inside the finite keys.
uint32_t scaled_key(double key, double factor, bool up) {
  const auto k = static_cast<uint32_t>(std::clamp(key, 0.0, static_cast<double>(kNonFinite - 1)));
  const double value = std::sqrt(squared_value(k)) * factor;
  const float rounded = static_cast<float>(std::min(value, 3.4e38));
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  bits &= 0x7FFFFFFFu;
  return up ? std::min(bits + 2, kNonFinite) : (bits > 2 ? bits - 2 : 0);
}

void bracket_module(const Problem& problem, int32_t module, const std::vector<int32_t>& layers,
                    const std::vector<Sketch>& sketches, Guess& guess) {
  const double keep = static_cast<double>(problem.keep[module]);
  const double total = static_cast<double>(problem.module_total[module]);
  std::vector<const Sketch*> mine;
  for (const int32_t l : layers) mine.push_back(&sketches[l]);
  const double threshold = threshold_for(mine, keep);
  double variance = 0;
  for (const Sketch* sketch : mine) {
    if (sketch->scale <= 1.0) continue;
    const Crossing at = cross(*sketch, threshold);
    const double share = std::clamp(at.kept / sketch->total, 0.0, 1.0);
    const double moved = at.density * sketch->deviation / 2;
    variance += sketch->scale * sketch->total * share * (1 - share) * kTuning.clustering + moved * moved;
  }
  const double margin = kTuning.sigmas * std::sqrt(variance) + 1;
  const double highest = keep - margin > 0 ? threshold_for(mine, keep - margin) : 1.0;
  const double lowest = keep + margin < total ? threshold_for(mine, keep + margin) : 0.0;
  for (size_t i = 0; i < mine.size(); ++i) {
    const Sketch& sketch = *mine[i];
    Bracket& bracket = guess.brackets[layers[i]];
    const double slack = std::min(0.5, kTuning.sigmas * sketch.deviation / 2) + 1e-6;
    const Crossing upper = cross(sketch, highest), lower = cross(sketch, lowest);
    bracket.low = std::max<uint32_t>(1, scaled_key(lower.key, 1 - slack, false));
    bracket.high = scaled_key(upper.key, 1 + slack, true);
    bracket.guess = scaled_key(cross(sketch, threshold).key, 1, true);
    const uint32_t unit = uint32_t{1} << problem.layer_granularity[layers[i]];
    if (unit > 1) {  // few magnitudes: widen to whole ones, and one more on each side
      bracket.low = std::max(unit, bracket.low / unit * unit) - (bracket.low >= 2 * unit ? unit : 0);
      bracket.high = std::min(kNonFinite, bracket.high / unit * unit + 2 * unit);
    }
    for (const Crossing& at : {upper, lower}) {  // a single magnitude is in or out as a whole
      if (at.step == nullptr || at.step->only == kMixed || at.step->only == 0) continue;
      bracket.low = std::min(bracket.low, at.step->only);
      bracket.high = std::max(bracket.high, at.step->only + 1);
    }
    double aside = 0, heaviest = 0;
    for (const Step& step : sketch.steps) {
      const uint32_t first = static_cast<uint32_t>(step.bin) << kShift;
      if (first >= bracket.high || first + (uint32_t{1} << kShift) <= bracket.low) continue;
      const double from = std::max<double>(first, bracket.low);
      const double to = std::min<double>(first + (uint32_t{1} << kShift), bracket.high);
      const bool single = step.only != kMixed;
      if (single && (step.only < bracket.low || step.only >= bracket.high)) continue;
      const double inside = single ? step.count : step.count * (to - from) / (uint32_t{1} << kShift);
      if (single && inside > heaviest && inside > kTuning.atom_share * sketch.total) {
        aside += heaviest;
        heaviest = inside;
        bracket.atom = step.only;
      } else {
        aside += inside;
      }
    }
    guess.aside[layers[i]] = aside;
  }
}

}  // namespace

Guess guess_brackets(const Problem& problem, const Pool& pool) {
  std::vector<std::vector<int32_t>> tensors(problem.layers()), layers(problem.modules());
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    tensors[problem.tensors[t].layer].push_back(static_cast<int32_t>(t));
  for (size_t l = 0; l < problem.layers(); ++l) layers[problem.layer_module[l]].push_back(static_cast<int32_t>(l));
  std::vector<Sketch> sketches(problem.layers());
  std::vector<Scratch> scratch(static_cast<size_t>(pool.workers()));
  pool.for_each(static_cast<int64_t>(problem.layers()), [&](int64_t l, int worker) {
    const bool alone = layers[problem.layer_module[l]].size() == 1;
    sketches[l] = sketch_layer(problem, static_cast<int32_t>(l), alone, tensors[l], scratch[worker]);
  });
  Guess guess{std::vector<Bracket>(problem.layers()), std::vector<double>(problem.layers())};
  pool.for_each(static_cast<int64_t>(problem.modules()), [&](int64_t m, int) {
    if (problem.keep[m] > 0 && problem.keep[m] < problem.module_total[m])
      bracket_module(problem, static_cast<int32_t>(m), layers[m], sketches, guess);
  });
  return guess;
}

}  // namespace dimap::cpu
