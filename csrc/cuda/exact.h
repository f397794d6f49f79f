// Exact scores of the intervals that bounds leave in doubt.
#pragma once

#include "cuda/layer.h"
#include "cuda/sum.h"

namespace dimap::cuda {

namespace solver {

// Adds the exact energy of one part of the bins above the unsure intervals to the layer's row.
template <typename Exec>
DIMAP_HD void add_exact_part(Exec& exec, const Layer& layer, int begin, int part) {
  const int size = (begin + kExactParts - 1) / kExactParts;
  const int from = part * size > 1 ? part * size : 1, to = (part + 1) * size < begin ? (part + 1) * size : begin;
  uint64_t low = 0, high = 0;  // bins of one exponent, in units of 2^(2 * at - 298)
  int at = -1;
  auto flush = [&] {
    const auto add = [&](int word, uint64_t term) { exec.add(layer.row + 2 + word, static_cast<Word>(term)); };
    if (low) split_words(low, 2 * at, add);
    if (high) split_words(high, 2 * at + 64, add);
  };
  for (int i = from; i < to; ++i) {
    const Word* bin = layer.bin(i);
    if (bin[0] == 0) continue;
    const int exponent = scale(layer.first(i));
    if (exponent != at) {
      if (at >= 0) flush();
      low = high = 0;
      at = exponent;
    }
    low += bin[1];
    high += low < bin[1];
    const uint64_t part_of_high = bin[2] << 24;
    low += part_of_high;
    high += (bin[2] >> 40) + (low < part_of_high);
  }
  if (at >= 0) flush();
}

// Exact scores of the unsure intervals, each of one magnitude, into `low`. The row holds the energy above them.
DIMAP_HD void exact_scores(const Layer& layer, int begin, int end) {
  Sum sum;
  sum.clear();
  for (int w = 0; w < kWords; ++w)
    if (layer.row[2 + w]) sum.add(layer.row[2 + w], 0, 32 * w);
  if (begin == 0) layer.low[0] = score64(layer.first(0), sum.value());  // what lies above the window is one magnitude
  for (int i = begin > 1 ? begin : 1; i < end && i < layer.intervals() - 1; ++i) {
    const Word* bin = layer.bin(i);
    if (bin[0] == 0) continue;
    const int exponent = scale(layer.first(i));
    sum.add(bin[1], 0, 2 * exponent);
    sum.add(bin[2], 0, 2 * exponent + 24);
    layer.low[i] = score64(layer.first(i), sum.value());
  }
  if (end == layer.intervals()) layer.low[end - 1] = 0.0;  // zeros: the only single magnitude below a window
}

}  // namespace solver

}  // namespace dimap::cuda
