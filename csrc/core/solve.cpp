#include "core/solve.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace dimap {
namespace {

// The bounds come from float64 running sums; their relative error is far below this. Exact sums are for the few bins
// that the bounds cannot part.
constexpr double kSlack = 1e-9;

struct Interval {
  uint32_t first, last;  // keys
  int64_t count;
  double low, high;  // bounds of the scores inside
  int64_t bin;       // index in the table, -1: above the window, -2: below it
};

struct LayerIntervals {
  std::vector<Interval> intervals;  // nonempty ones, largest magnitudes first
  std::vector<int64_t> cumulative;  // counts up to and including each
};

double upper_bound(uint32_t key, double energy_above) {
  if (key == 0) return 0.0;
  const double square = squared_value(key);
  return std::min(1.0, square / (energy_above + square) * (1 + kSlack));
}

double lower_bound(uint32_t key, double energy) {
  return key == 0 || energy == 0.0 ? 0.0 : squared_value(key) / energy * (1 - kSlack);
}

LayerIntervals intervals_of(const LayerTable& table) {
  LayerIntervals layer;
  auto& out = layer.intervals;
  const Window window = table.window;
  const auto bins = static_cast<int64_t>(table.bins.size());
  double energy = table.above_energy.value();
  int64_t seen = table.above;
  if (table.above > 0) {
    const uint32_t first = table.above_first;
    out.push_back(
        {first, kNonFinite - 1, table.above, std::max(window.above_low, lower_bound(first, energy)), 1.0, -1});
  }
  for (int64_t b = bins - 1; b >= 0; --b) {
    const Bin& bin = table.bins[b];
    if (bin.count == 0) continue;
    const auto first = static_cast<uint32_t>(window.base + (static_cast<uint64_t>(b) << window.shift));
    const uint32_t last = window.shift <= table.granularity
                              ? first
                              : first + (uint32_t{1} << window.shift) - (uint32_t{1} << table.granularity);
    const double high = upper_bound(last, energy);
    energy += static_cast<double>(bin.sum()) * power_of_two(2 * scale(first) - 298);
    // A bin of one magnitude has one score: its own energy is part of the sum in both bounds.
    const double low = lower_bound(first, energy);
    out.push_back({first, last, bin.count, low, first == last ? std::min(1.0, low * (1 + 3 * kSlack)) : high, b});
    seen += bin.count;
  }
  if (seen < table.total) {
    const uint32_t last = table.below_end ? table.below_end - 1 : 0;
    const double high = std::min(window.below_high, upper_bound(last, energy));
    out.push_back({0, last, table.total - seen, 0.0, high, -2});
  }
  int64_t sum = 0;
  layer.cumulative.reserve(out.size());
  for (const Interval& interval : out) layer.cumulative.push_back(sum += interval.count);
  return layer;
}

// The keep-th largest bound, to within a relative 2^-32 on the safe side. Bounds fall with the magnitude, up to their
// rounding, so each layer answers by binary search.
template <typename Bound>
double select_bound(const std::vector<LayerIntervals>& layers, int64_t keep, bool round_up, Bound bound) {
  auto enough = [&](double threshold) {
    int64_t count = 0;
    for (const LayerIntervals& layer : layers) {
      const auto it = std::partition_point(layer.intervals.begin(), layer.intervals.end(),
                                           [&](const Interval& i) { return bound(i) >= threshold; });
      if (it != layer.intervals.begin()) count += layer.cumulative[it - layer.intervals.begin() - 1];
    }
    return count >= keep;
  };
  uint64_t yes = 0, no = std::bit_cast<uint64_t>(1.0) + 1;  // enough(0) holds: every bound is >= 0
  while (no - yes > (uint64_t{1} << 20)) {
    const uint64_t middle = yes + (no - yes) / 2;
    (enough(std::bit_cast<double>(middle)) ? yes : no) = middle;
  }
  return std::bit_cast<double>(round_up ? no : yes);
}

// Exact scores of the intervals [begin, end) of one layer, each of which holds one magnitude.
void exact_scores(const LayerTable& table, const LayerIntervals& layer, size_t begin, size_t end,
                  std::vector<double>& scores) {
  Energy energy = table.above_energy;
  for (size_t i = 0; i < end; ++i) {
    const Interval& interval = layer.intervals[i];
    if (interval.bin >= 0) energy.add(table.bins[interval.bin].sum(), scale(interval.first));
    if (i >= begin) scores.push_back(score64(interval.first, energy.value()));
  }
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
  for (const LayerTable& table : tables) layers.push_back(intervals_of(table));
  const double low = select_bound(layers, keep, false, [](const Interval& i) { return i.low; });
  const double high = select_bound(layers, keep, true, [](const Interval& i) { return i.high; });

  bool decided = true;
  std::vector<std::pair<size_t, size_t>> unsure(layers.size());  // intervals that may hold the threshold
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& list = layers[l].intervals;
    size_t begin = 0, end = 0;
    while (begin < list.size() && list[begin].low > high) ++begin;
    next[l].escaped = false;
    for (end = begin; end < list.size() && list[end].high >= low; ++end) {
      const bool one_magnitude = list[end].first == list[end].last;
      decided &= one_magnitude;
      next[l].escaped |= list[end].bin < 0 && !one_magnitude;
    }
    unsure[l] = {begin, end};
  }

  if (!decided) {
    for (size_t l = 0; l < layers.size(); ++l) {
      const auto [begin, end] = unsure[l];
      const auto& list = layers[l].intervals;
      const uint32_t below_end = end < list.size() ? list[end].last + 1 : 0;
      const uint32_t above_first = begin > 0 ? list[begin - 1].first : kNonFinite;
      const uint32_t first = begin < end ? list[end - 1].first : below_end;
      const uint32_t last = begin < end ? list[begin].last : below_end;
      next[l].window = window_over(first, last, static_cast<int64_t>(tables[l].bins.size()), tables[l].granularity);
      next[l].window.below_end = below_end;
      next[l].window.above_first = above_first;
      next[l].window.below_high = end < list.size() ? list[end].high : 1.0;
      next[l].window.above_low = begin > 0 ? list[begin - 1].low : 0.0;
    }
    return {};
  }

  int64_t kept = 0;
  std::vector<Atom> atoms;
  std::vector<double> scores;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto [begin, end] = unsure[l];
    if (begin > 0) kept += layers[l].cumulative[begin - 1];
    scores.clear();
    exact_scores(tables[l], layers[l], begin, end, scores);
    for (size_t i = begin; i < end; ++i) atoms.push_back({scores[i - begin], l, i});
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
