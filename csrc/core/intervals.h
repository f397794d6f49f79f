// A layer's table as intervals of magnitudes, each with bounds of the scores inside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/table.h"

namespace dimap {

struct Interval {
  uint32_t first, last;  // keys
  int64_t count;
  double low, high;  // bounds of the scores inside
  int64_t bin;       // index in the table, -1: above the window, -2: below it

  bool one_magnitude() const { return first == last; }
};

// The nonempty intervals, largest magnitudes first.
inline std::vector<Interval> intervals_of(const LayerTable& table) {
  std::vector<Interval> out;
  out.reserve(2 + static_cast<size_t>(std::ranges::count_if(table.bins, [](const Bin& b) { return b.count != 0; })));
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
    out.push_back({first, last, bin.count, low, first == last ? std::min(1.0, low * (1 + 3 * kBoundSlack)) : high, b});
    seen += bin.count;
  }
  if (seen < table.total) {
    const uint32_t last = table.below_end ? table.below_end - 1 : 0;
    const double high = std::min(window.below_high, upper_bound(last, energy));
    out.push_back({0, last, table.total - seen, 0.0, high, -2});
  }
  return out;
}

// Calls body(i, score64) for those of the intervals [begin, end) that are bins of one magnitude.
template <typename Body>
void exact_scores(const LayerTable& table, const std::vector<Interval>& intervals, size_t begin, size_t end,
                  Body&& body) {
  if (begin == end) return;
  Energy energy = table.above_energy;
  for (size_t i = 0; i < end; ++i) {
    const Interval& interval = intervals[i];
    if (interval.bin >= 0) energy.add(table.bins[interval.bin].sum(), scale(interval.first));
    if (i >= begin && interval.one_magnitude()) body(i, score64(interval.first, energy.value()));
  }
}

// Where to look next, if the threshold lies between `low` and `high`, and the intervals [begin, end) may hold it.
struct Unsure {
  size_t begin = 0, end = 0;
};

inline Unsure unsure_between(const std::vector<Interval>& intervals, double low, double high) {
  Unsure unsure;
  while (unsure.begin < intervals.size() && intervals[unsure.begin].low > high) ++unsure.begin;
  for (unsure.end = unsure.begin; unsure.end < intervals.size() && intervals[unsure.end].high >= low;) ++unsure.end;
  return unsure;
}

inline Window closer_window(const LayerTable& table, const std::vector<Interval>& list, const Unsure& unsure) {
  const auto [begin, end] = unsure;
  const uint32_t below_end = end < list.size() ? list[end].last + 1 : 0;
  const uint32_t first = begin < end ? list[end - 1].first : below_end;
  const uint32_t last = begin < end ? list[begin].last : below_end;
  Window window = window_over(first, last, static_cast<int64_t>(table.bins.size()), table.granularity);
  window.below_end = below_end;
  window.above_first = begin > 0 ? list[begin - 1].first : kNonFinite;
  window.below_high = end < list.size() ? list[end].high : 1.0;
  window.above_low = begin > 0 ? list[begin - 1].low : 0.0;
  return window;
}

}  // namespace dimap
