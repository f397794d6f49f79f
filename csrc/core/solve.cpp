#include "core/solve.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <utility>

#include "core/intervals.h"

namespace dimap {
namespace {

constexpr size_t kFew = 64;  // intervals that are sooner put in order than parted further

struct LayerIntervals {
  explicit LayerIntervals(const LayerTable& table) : intervals(intervals_of(table)) {
    int64_t sum = 0;
    cumulative.reserve(intervals.size());
    for (const Interval& interval : intervals) cumulative.push_back(sum += interval.count);
  }
  // Weights in the first n intervals.
  int64_t count(size_t n) const { return n ? cumulative[n - 1] : 0; }

  std::vector<Interval> intervals;
  std::vector<int64_t> cumulative;  // counts up to and including each
};

// The keep-th largest bound. Bounds fall with the magnitude, up to their rounding, so each layer answers by binary
// search how many of its weights have at least some bound; a layer that is decided is not asked again, and few
// intervals that are left are put in order.
template <typename Bound>
double select_bound(const std::vector<LayerIntervals>& layers, int64_t keep, Bound bound) {
  struct Open {
    const LayerIntervals* layer;
    size_t begin, end, middle;
  };
  std::vector<Open> open;
  size_t left = 0;  // intervals
  for (const LayerIntervals& layer : layers) {
    open.push_back({&layer, 0, layer.intervals.size(), 0});
    left += layer.intervals.size();
  }
  int64_t decided = 0;                                      // weights of layers that are not open
  uint64_t yes = 0, no = std::bit_cast<uint64_t>(1.0) + 1;  // every bound is in [0, 1]
  while (left > kFew && no - yes > 1) {
    const uint64_t middle = yes + (no - yes) / 2;
    int64_t count = decided;
    for (Open& o : open) {
      const auto from = [&](const Interval& i) { return bound(i) >= std::bit_cast<double>(middle); };
      const Interval* all = o.layer->intervals.data();
      o.middle = static_cast<size_t>(std::partition_point(all + o.begin, all + o.end, from) - all);
      count += o.layer->count(o.middle);
    }
    const bool enough = count >= keep;
    (enough ? yes : no) = middle;
    left = 0;
    std::erase_if(open, [&](Open& o) {
      (enough ? o.end : o.begin) = o.middle;
      left += o.end - o.begin;
      if (o.begin == o.end) decided += o.layer->count(o.begin);
      return o.begin == o.end;
    });
  }
  if (left > kFew) return std::bit_cast<double>(yes);  // they are equal
  std::vector<std::pair<double, int64_t>> rest;        // bounds and weights
  for (const Open& o : open) {
    decided += o.layer->count(o.begin);
    for (size_t i = o.begin; i < o.end; ++i)
      rest.emplace_back(bound(o.layer->intervals[i]), o.layer->intervals[i].count);
  }
  std::sort(rest.begin(), rest.end(), std::greater<>());
  for (const auto& [value, weights] : rest)
    if ((decided += weights) >= keep) return value;
  return std::bit_cast<double>(yes);
}

struct Atom {
  double score;
  size_t layer, interval;
};

}  // namespace

ModuleCut solve(std::span<const LayerTable> tables, int64_t keep, std::span<Cut> cuts, std::span<Next> next) {
  if (keep == 0) {
    std::fill(cuts.begin(), cuts.end(), Cut{});
    return {.decided = true, .threshold = std::numeric_limits<double>::quiet_NaN()};
  }
  std::vector<LayerIntervals> layers;
  layers.reserve(tables.size());
  for (const LayerTable& table : tables) layers.emplace_back(table);
  const double low = select_bound(layers, keep, [](const Interval& i) { return i.low; });
  const double high = select_bound(layers, keep, [](const Interval& i) { return i.high; });

  bool decided = true;
  std::vector<Unsure> unsure;  // intervals that may hold the threshold
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& list = layers[l].intervals;
    unsure.push_back(unsure_between(list, low, high));
    next[l].escaped = false;
    for (size_t i = unsure[l].begin; i < unsure[l].end; ++i) {
      decided &= list[i].one_magnitude();
      next[l].escaped |= list[i].bin < 0 && !list[i].one_magnitude();
    }
  }

  if (!decided) {
    for (size_t l = 0; l < layers.size(); ++l) {
      next[l].window = closer_window(tables[l], layers[l].intervals, unsure[l]);
      next[l].settled = unsure[l].begin == unsure[l].end;
      next[l].kept = layers[l].count(unsure[l].begin);
    }
    return {};
  }

  int64_t kept = 0;
  std::vector<Atom> atoms;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto [begin, end] = unsure[l];
    kept += layers[l].count(begin);
    exact_scores(tables[l], layers[l].intervals, begin, end,
                 [&](size_t i, double score) { atoms.push_back({score, l, i}); });
    cuts[l] = {end < layers[l].intervals.size() ? layers[l].intervals[end].last + 1 : 0, Cut::kNoTie};
  }
  std::sort(atoms.begin(), atoms.end(), [](const Atom& a, const Atom& b) { return a.score > b.score; });
  auto keys = [&](const Atom& atom) { return layers[atom.layer].intervals[atom.interval].first; };
  size_t a = 0;
  ModuleCut module{.decided = true};
  while (a < atoms.size()) {  // groups of equal scores, best first
    size_t b = a;
    int64_t tied = 0;
    for (; b < atoms.size() && atoms[b].score == atoms[a].score; ++b)
      tied += layers[atoms[b].layer].intervals[atoms[b].interval].count;
    module.threshold = atoms[a].score;
    if (kept + tied < keep) {
      kept += tied;
      a = b;
      continue;
    }
    module.quota = keep - kept;
    const bool whole = module.quota == tied;
    for (size_t i = a; i < b; ++i)
      if (!whole) cuts[atoms[i].layer].tie = keys(atoms[i]);
    for (size_t i = whole ? b : a; i < atoms.size(); ++i) {
      Cut& cut = cuts[atoms[i].layer];
      cut.keep_from = std::max(cut.keep_from, keys(atoms[i]) + 1);
    }
    if (whole) module.quota = 0;
    break;
  }
  return module;
}

}  // namespace dimap
