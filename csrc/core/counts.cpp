#include "core/counts.h"

#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/wire.h"

namespace dimap {
namespace {

int64_t clip(int64_t count, const Set& set) { return std::clamp(count, set.least, set.most); }

// The intervals whose bound is at least the threshold: the first ones. Bounds fall with the magnitude.
template <typename Holds>
size_t first_ones(const std::vector<Interval>& intervals, Holds holds) {
  return static_cast<size_t>(std::partition_point(intervals.begin(), intervals.end(), holds) - intervals.begin());
}

}  // namespace

Counts::Counts(std::vector<Part> parts, std::vector<Set> sets, std::vector<int32_t> module,
               std::vector<int32_t> granularity, int64_t bins, uint32_t first, uint32_t last)
    : parts_(std::move(parts)),
      sets_(std::move(sets)),
      module_(std::move(module)),
      granularity_(std::move(granularity)),
      bins_(bins),
      wanted_(module_.size(), 1),
      parts_of_set_(sets_.size()),
      layers_(module_.size()),
      cumulative_(parts_.size()) {
  for (size_t p = 0; p < parts_.size(); ++p) parts_of_set_[parts_[p].set].push_back(static_cast<int32_t>(p));
  for (size_t l = 0; l < module_.size(); ++l) {
    const auto m = static_cast<size_t>(module_[l]);
    if (m >= layers_of_module_.size()) layers_of_module_.resize(m + 1), sets_of_module_.resize(m + 1);
    layers_of_module_[m].push_back(static_cast<int32_t>(l));
    windows_.push_back(window_over(first, last, bins, granularity_[l]));
  }
  for (size_t s = 0; s < sets_.size(); ++s) sets_of_module_[module_[sets_[s].layer]].push_back(static_cast<int32_t>(s));
}

void Counts::take(std::span<const int64_t> rows) {
  const auto columns = static_cast<size_t>(wire_columns(bins_));
  std::vector<std::vector<LayerTable>> tables(layers_.size());
  std::vector<std::vector<size_t>> parts(layers_.size());
  std::vector<Bin> bins;
  size_t next = 0;
  for (size_t p = 0; p < parts_.size(); ++p)
    if (wanted_[layer_of(static_cast<int64_t>(p))]) ++next;
  if (rows.size() != next * columns)
    throw std::invalid_argument("rows must be " + std::to_string(next) + " of " + std::to_string(columns) + " int64");
  bins.resize(next * static_cast<size_t>(bins_));
  next = 0;
  for (size_t p = 0; p < parts_.size(); ++p) {
    const auto l = static_cast<size_t>(layer_of(static_cast<int64_t>(p)));
    if (!wanted_[l]) continue;
    LayerTable table;
    const auto mine = std::span(bins).subspan(next * static_cast<size_t>(bins_), static_cast<size_t>(bins_));
    read_sums(rows.data() + next++ * columns, table, mine);
    table.total = parts_[p].total;
    tables[l].push_back(table);
    parts[l].push_back(p);
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    if (!wanted_[l]) continue;
    Layer& layer = layers_[l];
    layer.bins.assign(static_cast<size_t>(bins_), Bin{});
    layer.table = {};
    layer.table.look_through(windows_[l], windows_[l].end(bins_), windows_[l].base);
    layer.table.granularity = granularity_[l];
    for (const LayerTable& table : tables[l]) {
      layer.table.total += table.total;
      layer.table.above += table.above;
      layer.table.above_energy.add(table.above_energy);
      for (size_t b = 0; b < layer.bins.size(); ++b) {
        layer.bins[b].count += table.bins[b].count;
        layer.bins[b].low += table.bins[b].low;
        layer.bins[b].high += table.bins[b].high;
      }
    }
    layer.table.bins = layer.bins;
    layer.intervals = intervals_of(layer.table);
    exact_scores(layer.table, layer.intervals, 0, layer.intervals.size(),
                 [&](size_t i, double score) { layer.intervals[i].low = layer.intervals[i].high = score; });
    for (size_t i = 0; i < tables[l].size(); ++i) {
      const LayerTable& table = tables[l][i];
      std::vector<int64_t>& cumulative = cumulative_[parts[l][i]];
      cumulative.clear();
      int64_t sum = 0;
      for (const Interval& interval : layer.intervals) {
        sum =
            interval.bin == -2 ? table.total : sum + (interval.bin < 0 ? table.above : table.bins[interval.bin].count);
        cumulative.push_back(sum);
      }
    }
  }
}

// The largest threshold at which the module keeps enough, if a weight scores as `score` says of its interval; infinity
// where it does without any.
template <typename Score>
double Counts::threshold(int64_t module, int64_t keep, Score score) const {
  const auto enough = [&](double threshold) {
    int64_t count = 0;
    for (const int32_t s : sets_of_module_[module]) {
      const size_t i =
          first_ones(layers_[sets_[s].layer].intervals, [&](const Interval& x) { return score(x) >= threshold; });
      int64_t raw = 0;
      for (const int32_t p : parts_of_set_[s]) raw += this->count(static_cast<size_t>(p), i);
      count += clip(raw, sets_[s]);
    }
    return count >= keep;
  };
  uint64_t yes = 0, no = std::bit_cast<uint64_t>(1.0) + 1;  // every score is in [0, 1]
  if (enough(std::bit_cast<double>(no))) return std::numeric_limits<double>::infinity();
  while (no - yes > 1) {
    const uint64_t middle = yes + (no - yes) / 2;
    (enough(std::bit_cast<double>(middle)) ? yes : no) = middle;
  }
  return std::bit_cast<double>(yes);
}

std::pair<double, double> Counts::thresholds(int64_t module, int64_t keep) const {
  return {threshold(module, keep, [](const Interval& i) { return i.low; }),
          threshold(module, keep, [](const Interval& i) { return i.high; })};
}

Kept Counts::kept(std::span<const int64_t> keep) const {
  Kept kept;
  kept.sets.resize(sets_.size());
  kept.parts.resize(parts_.size());
  for (int64_t m = 0; m < modules(); ++m) {
    const auto [low, high] = thresholds(m, keep[m]);
    kept.low.push_back(low), kept.high.push_back(high);
    if (low == high && share_ties(m, keep[m], low, kept)) continue;
    for (const int32_t s : sets_of_module_[m]) {
      const auto& intervals = layers_[sets_[s].layer].intervals;
      const size_t surely = first_ones(intervals, [&](const Interval& x) { return x.low > high; });
      const size_t maybe = first_ones(intervals, [&](const Interval& x) { return x.high >= low; });
      Bounds all;
      for (const int32_t p : parts_of_set_[s]) {
        kept.parts[p] = {count(p, std::min(surely, maybe)), count(p, std::max(surely, maybe))};
        all.least += kept.parts[p].least, all.most += kept.parts[p].most;
      }
      kept.sets[s] = {clip(all.least, sets_[s]), clip(all.most, sets_[s])};
      if (all.least >= sets_[s].least && all.most <= sets_[s].most) continue;
      int64_t total = 0;
      for (const int32_t p : parts_of_set_[s]) total += parts_[p].total;
      for (const int32_t p : parts_of_set_[s]) {  // limited: how its parts share that, nobody counted
        const int64_t others = total - parts_[p].total;
        kept.parts[p] = {std::max<int64_t>(0, kept.sets[s].least - others),
                         std::min(parts_[p].total, kept.sets[s].most)};
      }
    }
  }
  for (size_t p = 0; p < parts_.size(); ++p) {
    const auto& intervals = layers_[layer_of(static_cast<int64_t>(p))].intervals;
    Bounds zeros;
    if (!intervals.empty() && intervals.back().first == 0) {
      zeros.most = parts_[p].total - count(p, intervals.size() - 1);
      if (intervals.back().one_magnitude()) zeros.least = zeros.most;
    }
    kept.nonzero.push_back({std::min(kept.parts[p].least, parts_[p].total - zeros.most),
                            std::min(kept.parts[p].most, parts_[p].total - zeros.least)});
  }
  return kept;
}

// Counts exactly what the module keeps where all that may tie with the threshold is known to; false where not.
bool Counts::share_ties(int64_t module, int64_t keep, double threshold, Kept& kept) const {
  int64_t left = keep;
  std::vector<std::pair<size_t, size_t>> tied;  // [sets] intervals
  std::vector<int64_t> raw;  // [sets] weights above the threshold, then with what they get of the ties
  for (const int32_t s : sets_of_module_[module]) {
    const auto& intervals = layers_[sets_[s].layer].intervals;
    const size_t begin = first_ones(intervals, [&](const Interval& x) { return x.low > threshold; });
    size_t end = begin;
    for (; end < intervals.size() && intervals[end].high >= threshold; ++end)
      if (intervals[end].low != threshold || intervals[end].high != threshold) return false;
    tied.emplace_back(begin, end);
    raw.push_back(0);
    for (const int32_t p : parts_of_set_[s]) raw.back() += count(p, begin);
    left -= clip(raw.back(), sets_[s]);
  }
  if (left < 0) return false;
  std::vector<std::pair<int32_t, size_t>> order;  // parts, and their sets' places
  for (size_t i = 0; i < tied.size(); ++i)
    for (const int32_t p : parts_of_set_[sets_of_module_[module][i]]) order.emplace_back(p, i);
  std::sort(order.begin(), order.end());  // by position
  for (const auto& [p, i] : order) {
    const Set& set = sets_[sets_of_module_[module][i]];
    const auto [begin, end] = tied[i];
    const int64_t before = clip(raw[i], set), ties = count(p, end) - count(p, begin);
    int64_t mine = ties;
    if (left == 0) {
      mine = 0;
    } else if (clip(raw[i] + ties, set) - before > left) {
      mine = before + left - raw[i];
    }
    raw[i] += mine;
    left -= clip(raw[i], set) - before;
    kept.parts[p] = {count(p, begin) + mine, count(p, begin) + mine};
  }
  if (left != 0) return false;
  for (size_t i = 0; i < tied.size(); ++i) {
    const int32_t s = sets_of_module_[module][i];
    const int64_t n = clip(raw[i], sets_[s]);
    kept.sets[s] = {n, n};
    if (n == raw[i]) continue;
    int64_t total = 0;
    for (const int32_t p : parts_of_set_[s]) total += parts_[p].total;
    for (const int32_t p : parts_of_set_[s])
      kept.parts[p] = {std::max<int64_t>(0, n - (total - parts_[p].total)), std::min(parts_[p].total, n)};
  }
  return true;
}

bool Counts::close_in(std::span<const int64_t> keep_least, std::span<const int64_t> keep_most) {
  bool closer = false;
  for (int64_t m = 0; m < modules(); ++m) {
    const double low = thresholds(m, keep_most[m]).first, high = thresholds(m, keep_least[m]).second;
    for (const int32_t l : layers_of_module_[m]) {
      const auto& intervals = layers_[l].intervals;
      const Unsure unsure = unsure_between(intervals, low, high);
      wanted_[l] = 0;
      for (size_t i = unsure.begin; i < unsure.end; ++i) wanted_[l] |= !intervals[i].one_magnitude();
      if (!wanted_[l]) continue;
      const Window window = closer_window(layers_[l].table, intervals, unsure);
      wanted_[l] = window != windows_[l];
      windows_[l] = window;
      closer |= wanted_[l] != 0;
    }
  }
  return closer;
}

std::vector<std::pair<int64_t, double>> Counts::curve(int64_t part) const {
  const Layer& layer = layers_[layer_of(part)];
  std::vector<std::pair<int64_t, double>> curve;
  for (size_t i = layer.intervals.size(); i-- > 0;) {
    const Interval& interval = layer.intervals[i];
    const int64_t n = count(static_cast<size_t>(part), i + 1) - count(static_cast<size_t>(part), i);
    double energy = 0;  // below the window: nothing is known of it, but that it is less than of any bin
    if (interval.bin == -1) energy = layer.table.above_energy.value();
    if (interval.bin >= 0)
      energy =
          static_cast<double>(layer.table.bins[interval.bin].sum()) * power_of_two(2 * scale(interval.first) - 298);
    if (n) curve.emplace_back(n, energy / static_cast<double>(interval.count));
  }
  return curve;
}

}  // namespace dimap
