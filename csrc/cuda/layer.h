// What a solve works on: its arguments, the block's shared memory, and a layer's table as intervals of falling
// magnitude.
#pragma once

#include "cuda/plan.h"

namespace dimap::cuda {

constexpr int kProbes = 128;     // thresholds tried at a time
constexpr int kSegments = 256;   // of a layer's intervals, for the running sums
constexpr int kStrides = 16;     // of segments
constexpr int kExactParts = 32;  // of a layer's bins above those that need exact scores

// The search for a module's threshold: the keep-th largest lower bound (0) and upper bound (1) of all weights' scores,
// as bits of float64. At least as many as are wanted lie at `yes`, fewer at `no`.
struct Search {
  Word yes[2], no[2];
  Word from[2], step[2];  // thresholds to try next: from + probe * step
  int32_t open, hinted;
};

// Intervals of a layer, largest magnitudes first: 0 is what lies above the window, then the bins, then what lies below.
struct Scratch {
  double *low, *high;     // [layers, stride] bounds of the scores inside
  int64_t* seen;          // [layers, stride] weights up to and including the interval
  uint32_t *begin, *end;  // [layers] intervals that may hold the threshold
  int64_t stride;         // bins + 2
  Search* searches;       // [modules]
  Word* counts;           // [modules, 2, kProbes]
  int32_t* open;          // [2]
};

struct SolverShared {
  union {
    struct {
      double energy[kSegments];
      int64_t count[kSegments];
      double stride_energy[kStrides];
      int64_t stride_count[kStrides];
    } bound;
    struct {
      Word kept, tied, next, current;
      int32_t go_on, undecided;
    } find;
  };
};

// What a solve is for.
enum class Goal : int32_t {
  kGuess,   // the table is of a sample: find windows that should hold the cuts, decide nothing
  kNarrow,  // windows are wide: bounds may be coarse where they do not decide
  kDecide,
};

struct SolveArgs {
  Plan plan;
  LayerState* layers;
  ModuleState* modules;
  Word* table;  // [layers, kHead + 3 * bins]; the sums above a window change where exact scores are found
  Scratch scratch;
  int32_t bins;
  int32_t sample_ratio;  // one run of 32 weights in this many is sampled, at most
  int32_t most_aside;    // weights of a whole chunk that a slot holds; 0: brackets are not for setting aside
  Goal goal;
};

namespace solver {

struct Layer {  // one layer's part of the arguments
  Word* row;
  View view;
  int granularity;
  int32_t number;
  uint32_t ratio;
  int64_t total;
  double least, most;  // as in LayerState
  double *low, *high;
  int64_t* seen;

  DIMAP_HD int intervals() const { return static_cast<int>(view.bins) + 2; }
  DIMAP_HD int bin_of(int i) const { return static_cast<int>(view.bins) - i; }
  DIMAP_HD uint32_t first(int i) const {
    if (i == 0) {
      const uint32_t end = view.end() < kNonFinite ? view.end() : kNonFinite;
      return end > view.above_first ? end : view.above_first;
    }
    return i == intervals() - 1 ? 0 : view.base + (static_cast<uint32_t>(bin_of(i)) << view.shift);
  }
  DIMAP_HD uint32_t last(int i) const {
    if (i == 0) return kNonFinite - 1;
    if (i == intervals() - 1) {
      const uint32_t end = view.base < view.below_end ? view.base : view.below_end;
      return end ? end - 1 : 0;
    }
    const uint32_t key = first(i);
    return static_cast<int>(view.shift) <= granularity
               ? key
               : key + (uint32_t{1} << view.shift) - (uint32_t{1} << granularity);
  }
  DIMAP_HD const Word* bin(int i) const { return row + kHead + 3 * bin_of(i); }
  DIMAP_HD int64_t count(int i) const {  // not for the interval below
    return static_cast<int64_t>(i == 0 ? row[1] : *bin(i)) * ratio;
  }
  DIMAP_HD double energy(int i) const {
    double sum = 0;
    if (i == 0) {
      Word words[kWords];  // all loads at once: each takes as long as a hundred sums
      for (int w = 0; w < kWords; ++w) words[w] = row[2 + w];
      for (int w = kWords - 1; w >= 0; --w)
        if (words[w]) sum += static_cast<double>(words[w]) * power_of_two(32 * w - 298);
    } else {
      const Word* b = bin(i);
      if (b[0])
        sum = (static_cast<double>(b[1]) + static_cast<double>(b[2]) * 16777216.0) *
              power_of_two(2 * scale(first(i)) - 298);
    }
    return sum * ratio;
  }
  DIMAP_HD int64_t before(int i) const { return i > 0 ? seen[i - 1] : 0; }
  // First interval for which the test fails; the test must hold for a head of the intervals.
  template <typename Test>
  DIMAP_HD int head(Test&& test) const {
    int from = 0, to = intervals();
    while (from < to) {
      const int middle = (from + to) / 2;
      if (test(middle))
        from = middle + 1;
      else
        to = middle;
    }
    return from;
  }
};

DIMAP_HD Layer layer_of(const SolveArgs& a, int32_t l) {
  const LayerState& state = a.layers[l];
  const int64_t at = l * a.scratch.stride;
  return {a.table + l * columns_of(a.bins),
          state.view,
          a.plan.layers[l].granularity,
          l,
          a.goal == Goal::kGuess ? state.ratio : 1u,
          a.plan.layers[l].total,
          state.least,
          state.most,
          a.scratch.low + at,
          a.scratch.high + at,
          a.scratch.seen + at};
}

}  // namespace solver

}  // namespace dimap::cuda
