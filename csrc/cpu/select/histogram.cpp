#include "cpu/select/histogram.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dimap::cpu {
namespace {

constexpr uint32_t kGroup = 64;  // bins that an exchange takes together: an octave of normal numbers
constexpr uint32_t kGroups = (Sketch::kBins + kGroup - 1) / kGroup;
constexpr double kUnit = 0x1p32;      // steps in an energy that goes through an exchange: sums of 2^31 runs fit,
constexpr double kRunMost = 1 << 16;  // with so many weights at most in a run

}  // namespace

std::pair<uint32_t, uint32_t> Cells::add_keys(std::span<const uint32_t> keys, int coarse) {
  int32_t top = 0, bottom = INT32_MAX;  // keys are below 2^31, and processors compare signed numbers
  for (const uint32_t key : keys) {
    top = std::max(top, static_cast<int32_t>(key));
    bottom = std::min(bottom, static_cast<int32_t>(key));
  }
  const auto bin_of = [&](uint32_t key) { return Sketch::coarser(Sketch::bin_of(key), coarse); };
  if (bottom >> 23) {  // all are normal: their bins are their upper bits, but for where these begin
    const int shift = Sketch::kShift + coarse;
    const uint32_t begin = bin_of(static_cast<uint32_t>(bottom)) - (static_cast<uint32_t>(bottom) >> shift);
    for (const uint32_t key : keys) add((key >> shift) + begin, 1, key & ((1u << shift) - 1));
  } else {
    for (const uint32_t key : keys) {
      const uint32_t bin = bin_of(key);
      add(bin, 1, key - Sketch::first_of(bin, coarse));
    }
  }
  return {bin_of(static_cast<uint32_t>(bottom)), bin_of(static_cast<uint32_t>(top))};
}

void Cells::take(Cells& other) {
  for (size_t b = 0; b < cells_.size(); ++b) {
    const Cell cell = std::exchange(other.cells_[b], {});
    cells_[b].count += cell.count, cells_[b].rest += cell.rest;
  }
}

std::vector<Histogram::Bin> Cells::move_out(uint32_t low, uint32_t high) {
  std::vector<Histogram::Bin> bins;
  bins.reserve(static_cast<size_t>(std::count_if(cells_.begin() + low, cells_.begin() + high + 1,
                                                 [](const Cell& cell) { return cell.count != 0; })));
  for (uint32_t b = low; b <= high; ++b) {
    const Cell cell = std::exchange(cells_[b], {});
    if (cell.count) bins.push_back({b, cell.count, cell.rest});
  }
  return bins;
}

void add_up(std::span<Histogram> histograms, const Exchange& exchange) {
  // First which groups are in use at all: an exchange of every bin would be large.
  std::vector<int64_t> used(histograms.size() * kGroups);
  for (size_t l = 0; l < histograms.size(); ++l)
    for (const Histogram::Bin& bin : histograms[l].bins) used[l * kGroups + bin.bin / kGroup] = 1;
  exchange.sum(used);
  std::vector<int64_t> place(used.size(), -1);
  constexpr size_t kHead = 5;
  size_t size = kHead * histograms.size();
  for (size_t g = 0; g < used.size(); ++g)
    if (used[g]) place[g] = static_cast<int64_t>(std::exchange(size, size + 2 * kGroup));
  std::vector<int64_t> numbers(size);
  std::vector<double> units(histograms.size());  // of a layer's energies: no weight of any rank has more
  for (size_t l = 0; l < histograms.size(); ++l) {
    const Histogram& h = histograms[l];
    uint32_t top = 0;
    for (uint32_t g = 0; g < kGroups; ++g)
      if (used[l * kGroups + g]) top = std::min<uint32_t>((g + 1) * kGroup, Sketch::kBins - 1);
    units[l] = squared_value(std::min(Sketch::first_of(top), kNonFinite - 1)) * kRunMost;
    int64_t* head = numbers.data() + kHead * l;
    head[0] = h.runs, head[1] = h.above, head[2] = h.above_squares;
    if (units[l] > 0 && std::isfinite(h.energy_squares)) {
      head[3] = static_cast<int64_t>(h.energy / units[l] * kUnit);
      head[4] = static_cast<int64_t>(h.energy_squares / (units[l] * units[l]) * kUnit);
    }
    for (const Histogram::Bin& bin : h.bins) {
      int64_t* cell = numbers.data() + place[l * kGroups + bin.bin / kGroup] + 2 * (bin.bin % kGroup);
      cell[0] = bin.count, cell[1] = bin.rest;
    }
  }
  exchange.sum(numbers);
  for (size_t l = 0; l < histograms.size(); ++l) {
    const int64_t* head = numbers.data() + kHead * l;
    Histogram sum;
    sum.runs = head[0], sum.above = head[1], sum.above_squares = head[2];
    sum.energy = static_cast<double>(head[3]) / kUnit * units[l];
    sum.energy_squares = static_cast<double>(head[4]) / kUnit * units[l] * units[l];
    for (uint32_t g = 0; g < kGroups; ++g) {
      if (place[l * kGroups + g] < 0) continue;
      const int64_t* cells = numbers.data() + place[l * kGroups + g];
      for (uint32_t b = 0; b < kGroup; ++b)
        if (cells[2 * b]) sum.bins.push_back({g * kGroup + b, cells[2 * b], cells[2 * b + 1]});
    }
    histograms[l] = std::move(sum);
  }
}

Sketch sketch_of(const Histogram& histogram, int64_t total, bool exact) {
  Sketch sketch;
  sketch.total = static_cast<double>(total);
  int64_t taken = 0;
  for (const Histogram::Bin& bin : histogram.bins) taken += bin.count;
  const auto n = static_cast<double>(taken);
  exact |= taken == total;  // a small layer's sample is all of it
  sketch.exact = exact;
  sketch.coarse = histogram.coarse;
  sketch.scale = exact || taken == 0 ? 1 : sketch.total / n;
  if (exact) {
    sketch.deviation = 2e-5;  // of the squares in a bin around that of their mean, at most, over sigmas
  } else if (sketch.scale > 1 && histogram.energy > 0) {
    const auto runs = static_cast<double>(histogram.runs);
    // The variance of a run's energy over its mean.
    const double spread = std::max(0.0, histogram.energy_squares / histogram.energy - histogram.energy / runs);
    sketch.deviation = std::sqrt(spread / histogram.energy);
    const auto above = static_cast<double>(histogram.above);
    if (above > 0 && above < n && runs > 1) {
      const double variance = static_cast<double>(histogram.above_squares) - above * above / runs;
      sketch.clustering = std::max(sketch.clustering, variance / (above * (1 - above / n)));
    }
  }
  sketch.steps.reserve(histogram.bins.size());
  for (auto bin = histogram.bins.rbegin(); bin != histogram.bins.rend(); ++bin) {
    const uint32_t first = histogram.first_of(bin->bin);
    if (first >= kNonFinite) continue;  // reading will find what is not finite
    const auto mean = std::min(first + static_cast<uint32_t>(bin->rest / bin->count), kNonFinite - 1);
    const bool heavy = static_cast<double>(bin->count) > Sketch::kAtomShare * n;
    const bool equal = (heavy || bin->bin == 0) && bin->rest % bin->count == 0;  // or nearly so: it is a guess
    const uint32_t end = histogram.first_of(bin->bin + 1);
    double square = squared_value(mean);
    if (!equal && bin->count > 1) {  // and the variance of what is spread evenly
      const double width = static_cast<double>(end - first) / significand(mean);
      square *= 1 + width * width / 12 * static_cast<double>(bin->count - 1) / static_cast<double>(bin->count);
    }
    sketch.add(first, end, equal ? mean : Sketch::kMixed, static_cast<double>(bin->count) * sketch.scale, square);
  }
  return sketch;
}

}  // namespace dimap::cpu
