// Bounds of the scores in the intervals of a layer, from running sums in float64.
#pragma once

#include "cuda/layer.h"

namespace dimap::cuda {

namespace solver {

// Running sums and bounds of one segment of a layer, from the sums before it.
DIMAP_HD void bound_segment(const Layer& layer, int from, int to, double energy, int64_t seen) {
  const int n = layer.intervals();
  for (int i = from; i < to; ++i) {
    double low, high;
    if (i == n - 1) {
      const int64_t rest = layer.total - seen;
      low = 0.0;
      high = rest > 0 ? upper_bound(layer.last(i), energy) : 0.0;
      // An earlier survey may have known more than the sum: weights that are equal share their energy.
      if (high > layer.most) high = layer.most;
      if (rest > 0) seen += rest;
    } else {
      const int64_t count = layer.count(i);
      const uint32_t first = layer.first(i), last = layer.last(i);
      high = i == 0 ? 1.0 : upper_bound(last, energy);
      energy += layer.energy(i);
      seen += count;
      // Empty intervals get bounds too, falling like the others', so that binary searches work.
      low = energy == 0.0 ? (count ? 0.0 : 1.0) : lower_bound(first, energy);
      if (i == 0 && low < layer.least) low = layer.least;
      if (count && i > 0 && first == last) {  // one magnitude, one score
        const double score = low * (1 + 3 * kBoundSlack);
        high = score < 1.0 ? score : 1.0;
      }
    }
    layer.low[i] = low;
    layer.high[i] = high;
    layer.seen[i] = seen;
  }
}

}  // namespace solver

// Bounds of the scores in the intervals of layer l: a block for a layer, before its module is solved.
template <typename Exec>
DIMAP_HD void bound_layer(Exec& exec, const SolveArgs& a, int32_t l, SolverShared& shared) {
  using namespace solver;
  auto& s = shared.bound;
  const Layer layer = layer_of(a, l);
  const int n = layer.intervals() - 1, size = (n + kSegments - 1) / kSegments, each = kSegments / kStrides;
  exec.each(kSegments, [&](int64_t j) {
    const int from = static_cast<int>(j) * size, to = from + size < n ? from + size : n;
    double energy = 0;
    int64_t count = 0;
    for (int i = from; i < to; ++i) energy += layer.energy(i), count += layer.count(i);
    s.energy[j] = energy, s.count[j] = count;
  });
  // To the sums before each segment: inside strides, over strides, both.
  exec.each(kStrides, [&](int64_t k) {
    double energy = 0;
    int64_t count = 0;
    for (int64_t j = k * each; j < (k + 1) * each; ++j) {
      const double e = s.energy[j];
      const int64_t c = s.count[j];
      s.energy[j] = energy, s.count[j] = count;
      energy += e, count += c;
    }
    s.stride_energy[k] = energy, s.stride_count[k] = count;
  });
  exec.one([&] {
    double energy = 0;
    int64_t count = 0;
    for (int k = 0; k < kStrides; ++k) {
      const double e = s.stride_energy[k];
      const int64_t c = s.stride_count[k];
      s.stride_energy[k] = energy, s.stride_count[k] = count;
      energy += e, count += c;
    }
  });
  exec.each(kSegments, [&](int64_t j) {
    const int from = static_cast<int>(j) * size;
    int to = from + size < n ? from + size : n;
    if (from < n && to == n) to = n + 1;  // and what lies below the window
    bound_segment(layer, from, to, s.stride_energy[j / each] + s.energy[j], s.stride_count[j / each] + s.count[j]);
  });
}

}  // namespace dimap::cuda
