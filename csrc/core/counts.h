// How many weights of each part of a network a pruning keeps, for any `keep`, without pruning: bounds from surveys,
// which further surveys close until they meet.
//
// Budgets and limits are planned by it. The kept weights of a part only grow with its module's `keep`, so what a bound
// says of one `keep` holds on that side of it.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/intervals.h"

namespace dimap {

// Weights that are counted by themselves, in order of position: the tensors of a part are neighbours.
struct Part {
  int32_t set;
  int64_t total;
};

// Neighbouring parts that together keep at least and at most so many weights, all of one layer: its squares are summed
// with those of other sets of the layer.
struct Set {
  int32_t layer;
  int64_t least, most;
};

struct Bounds {
  int64_t least = 0, most = 0;
};

// What a pruning keeps, each as bounds.
struct Kept {
  std::vector<Bounds> sets;
  std::vector<Bounds> parts;
  std::vector<Bounds> nonzero;  // [parts] of the kept weights
  std::vector<double> low;      // [modules] the threshold lies in [low, high]; infinity where all sets keep their least
  std::vector<double> high;
};

class Counts {
 public:
  // module [layers]; granularity [layers] low zero bits of every key; bins of a window; the first windows go from the
  // key `first` to `last`.
  Counts(std::vector<Part> parts, std::vector<Set> sets, std::vector<int32_t> module, std::vector<int32_t> granularity,
         int64_t bins, uint32_t first, uint32_t last);

  // Where to survey next: [layers], and whether the layer needs it at all.
  const std::vector<Window>& windows() const { return windows_; }
  const std::vector<uint8_t>& wanted() const { return wanted_; }
  // The rows (wire.h) of the parts of all wanted layers, in order, surveyed through their layers' windows.
  void take(std::span<const int64_t> rows);

  // keep: [modules], each in the sum of its sets' limits.
  Kept kept(std::span<const int64_t> keep) const;

  // Sets windows that close in on the thresholds of every keep between the two. False: nothing is closer than what is
  // known.
  bool close_in(std::span<const int64_t> keep_least, std::span<const int64_t> keep_most);

  // The intervals of one part, from the smallest magnitudes up: their weights, and the mean of the squares of all
  // weights of the layer in them.
  std::vector<std::pair<int64_t, double>> curve(int64_t part) const;

  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }
  int64_t modules() const { return static_cast<int64_t>(sets_of_module_.size()); }
  int32_t layer_of(int64_t part) const { return sets_[parts_[part].set].layer; }
  int64_t bins() const { return bins_; }
  int granularity(int32_t layer) const { return granularity_[layer]; }

 private:
  struct Layer {
    std::vector<Bin> bins;
    LayerTable table;
    std::vector<Interval> intervals;
  };
  // Weights of a part in the first i intervals of its layer.
  int64_t count(size_t part, size_t i) const { return i ? cumulative_[part][i - 1] : 0; }
  std::pair<double, double> thresholds(int64_t module, int64_t keep) const;
  bool share_ties(int64_t module, int64_t keep, double threshold, Kept& kept) const;
  template <typename Score>
  double threshold(int64_t module, int64_t keep, Score score) const;

  std::vector<Part> parts_;
  std::vector<Set> sets_;
  std::vector<int32_t> module_, granularity_;
  const int64_t bins_;
  std::vector<Window> windows_;
  std::vector<uint8_t> wanted_;
  std::vector<std::vector<int32_t>> parts_of_set_, sets_of_module_, layers_of_module_;
  std::vector<Layer> layers_;
  std::vector<std::vector<int64_t>> cumulative_;  // [parts][intervals of its layer]
};

}  // namespace dimap
