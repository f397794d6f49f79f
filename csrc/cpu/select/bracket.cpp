#include "cpu/select/bracket.h"

#include <algorithm>
#include <cmath>

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  double sigmas = 3.5;              // half width of a bracket
  double slack = 1e-5;              // ... and in any case, of the score
  double ladder_share = 1.0 / 256;  // of a layer beyond its grid: more than that are not summed one by one
} kTuning;

using Step = Sketch::Step;

double magnitude(double key) { return std::sqrt(squared_value(static_cast<uint32_t>(key))); }

struct Crossing {
  double key, kept;  // where the score falls to the threshold, and how many weights are above
  double density;    // weights per unit of ln(magnitude) there
  const Step* step;  // the bin that holds the crossing, or the next lower one, if any
};

Crossing cross(const Sketch& sketch, double threshold) {
  const auto& steps = sketch.steps;
  const auto it = std::partition_point(steps.begin(), steps.end(), [&](const Step& s) { return s.low >= threshold; });
  if (it == steps.end()) return {0, sketch.total, 0, nullptr};
  double part = 0;  // of the bin that lies above the crossing
  if (threshold < it->high && it->low > 0)
    part = std::log(it->high / threshold) / std::log(it->high / it->low);
  else if (threshold < it->high)
    part = 1 - (threshold - it->low) / (it->high - it->low);
  part = std::clamp(part, 0.0, 1.0);
  const double width = it->first ? std::log(magnitude(it->end) / magnitude(it->first)) : 1.0;
  const double key = it->first + (1 - part) * (it->end - it->first);
  return {key, it->above + part * it->count, it->count / width, &*it};
}

// The threshold that keeps so many weights, as far as the sketches say; sought near `about`, if that is not 0.
double threshold_for(const std::vector<const Sketch*>& sketches, double keep, double about = 0) {
  struct Part {  // of a layer's steps, where the score falls to the threshold
    const Step *begin, *end, *middle;
  };
  std::vector<Part> parts;
  for (const Sketch* sketch : sketches)
    parts.push_back({sketch->steps.data(), sketch->steps.data() + sketch->steps.size(), nullptr});
  const auto kept_at = [&](double log) {
    const double threshold = std::exp(log);
    double kept = 0;
    for (size_t l = 0; l < sketches.size(); ++l) {
      Part& part = parts[l];
      part.middle = std::partition_point(part.begin, part.end, [&](const Step& s) { return s.low >= threshold; });
      const Step* step = part.middle;
      if (step == sketches[l]->steps.data() + sketches[l]->steps.size()) {
        kept += sketches[l]->total;
        continue;
      }
      kept += step->above;
      const double high = step->high, range = high - step->low;
      if (threshold < high)  // and of this step a part: its magnitudes are spread evenly, nearly
        kept += (high - threshold) * (3 * high + step->low) / (range * (3 * high + threshold)) * step->count;
    }
    return kept;
  };
  // Of ln(threshold): between `low`, which keeps enough, and `high`, which does not.
  double low = std::log(1e-200), high = 0, kept_low = 0, kept_high = 0;
  for (const Sketch* sketch : sketches) kept_low += sketch->total;
  const auto narrow = [&](double log, double kept) {
    const bool enough = kept >= keep;
    (enough ? low : high) = log, (enough ? kept_low : kept_high) = kept;
    for (Part& part : parts) (enough ? part.end : part.begin) = part.middle;
  };
  if (about > 0)
    for (const double side : {-0.25, 0.25}) {
      const double log = std::log(about) + side;
      if (log > low && log < high) narrow(log, kept_at(log));
    }
  for (int i = 0; high - low > 1e-6 && std::abs(kept_low - keep) >= 0.5; ++i) {
    // In turns on a straight line between the two, and half-way.
    const double part = i % 2 ? 0.5 : std::clamp((kept_low - keep) / (kept_low - kept_high), 0.02, 0.98);
    const double log = low + part * (high - low);
    narrow(log, kept_at(log));
  }
  return std::exp(low);
}

uint32_t finite(double key) { return static_cast<uint32_t>(std::clamp(key, 0.0, static_cast<double>(kNonFinite - 1))); }

// slack: the layer's energy may be wrong by this part of it, and with it all its scores. look: there will be a closer
// one.
Bracket bracket_of(const Sketch& sketch, const Threshold& threshold, double slack, int granularity, bool look) {
  const Crossing upper = cross(sketch, threshold.highest * (1 + slack));
  const Crossing lower = cross(sketch, threshold.lowest / (1 + slack));
  Bracket bracket;
  bracket.low = std::max<uint32_t>(1, finite(lower.key - 2));
  bracket.high = finite(upper.key + 2) + 1;
  if (sketch.exact) {  // where in a bin the weights are is not known, but which are in it
    const auto edge = [&](uint32_t key, uint32_t bins) {
      return Sketch::first_of(Sketch::coarser(Sketch::bin_of(key), sketch.coarse) + bins, sketch.coarse);
    };
    bracket.low = std::max<uint32_t>(1, edge(bracket.low, 0));
    bracket.high = std::min(kNonFinite, edge(bracket.high, 1));
  }
  const uint32_t unit = uint32_t{1} << granularity;
  if (unit > 1) {  // few magnitudes: widen to whole ones, and one more on each side
    bracket.low = std::max(unit, bracket.low / unit * unit) - (bracket.low >= 2 * unit ? unit : 0);
    bracket.high = std::min(kNonFinite, bracket.high / unit * unit + 2 * unit);
  }
  // No weights are known of between the bracket and the next ones: let them bound it, the closer the better.
  const auto& steps = sketch.steps;
  const auto inside =
      std::partition_point(steps.begin(), steps.end(), [&](const Step& step) { return step.first >= bracket.high; });
  if (inside != steps.begin() && !look) {
    const Step& next = *std::prev(inside);
    bracket.high = std::max(bracket.high, next.only != Sketch::kMixed ? next.only : next.first);
  }
  if (sketch.exact) {
    const auto below =
        std::partition_point(inside, steps.end(), [&](const Step& step) { return step.end > bracket.low; });
    if (below != inside && std::prev(below)->first > bracket.low) bracket.low = std::prev(below)->first;
  }
  bracket.guess = std::clamp(finite(cross(sketch, threshold.likely).key), bracket.low, bracket.high);
  return bracket;
}

// Names the bracket's heaviest magnitude its atom; returns how many weights are left to be set aside.
double fill(const Sketch& sketch, Bracket& bracket) {
  double aside = 0, heaviest = 0;
  for (const Step& step : sketch.steps) {
    if (step.first >= bracket.high || step.end <= bracket.low) continue;
    if (step.only == Sketch::kMixed) {
      const double inside = std::min(step.end, bracket.high) - std::max(step.first, bracket.low);
      aside += step.count * inside / (step.end - step.first);
    } else if (step.only >= bracket.low && step.only < bracket.high) {
      if (step.count > heaviest && step.count > Sketch::kAtomShare * sketch.total) {
        aside += heaviest;
        heaviest = step.count;
        bracket.atom = step.only;
      } else {
        aside += step.count;
      }
    }
  }
  return aside;
}

// Where many weights lie beyond the bracket's grid: grids that hold them all.
std::vector<uint32_t> ladder(const Sketch& sketch, const Bracket& bracket) {
  std::vector<uint32_t> rungs;
  uint32_t limit = Grid(bracket.high).limit;
  const auto beyond = std::partition_point(sketch.steps.begin(), sketch.steps.end(),
                                           [&](const Step& step) { return step.first >= limit; });
  if (beyond == sketch.steps.begin() ||
      std::prev(beyond)->above + std::prev(beyond)->count <= kTuning.ladder_share * sketch.total)
    return rungs;
  for (auto step = beyond; step != sketch.steps.begin();) {
    --step;
    if (step->first < limit) continue;
    rungs.push_back(std::max(limit, step->first >> 23 << 23));
    limit = Grid(rungs.back()).limit;
  }
  return rungs;
}

}  // namespace

void bracket_module(const Problem& problem, int64_t module, std::span<const int32_t> layers,
                    std::span<const Sketch> sketches, std::span<Guess> guesses) {
  const auto keep = static_cast<double>(problem.keep[module]);
  const auto total = static_cast<double>(problem.module_total[module]);
  if (keep == 0) return;
  std::vector<const Sketch*> mine;
  for (const int32_t l : layers) mine.push_back(&sketches[l]);
  Threshold threshold;
  threshold.likely = threshold_for(mine, keep);
  // A module of one layer keeps so many of its weights, whatever their energy.
  const bool alone = mine.size() == 1;
  double variance = 0, unsure = 1;  // of the number of weights above the threshold
  for (const Sketch* sketch : mine) {
    const Crossing at = cross(*sketch, threshold.likely);
    if (sketch->exact) {
      if (at.step && at.step->only == Sketch::kMixed) unsure += at.step->count;
      continue;
    }
    if (sketch->scale <= 1.0) continue;
    const double share = std::clamp(at.kept / sketch->total, 0.0, 1.0);
    const double moved = alone ? 0 : at.density * sketch->deviation / 2;
    variance += sketch->scale * sketch->total * share * (1 - share) * sketch->clustering + moved * moved;
    unsure += moved * sketch->deviation;  // all layers on one side: what is counted is no straight line of the energy
  }
  const double margin = kTuning.sigmas * std::sqrt(variance) + unsure;
  if (alone && guesses[layers[0]].close && !mine[0]->exact) {  // a closer look counts
    threshold.lowest = threshold.highest = threshold.likely;
  } else {
    if (keep - margin > 0) threshold.highest = threshold_for(mine, keep - margin, threshold.likely);
    if (keep + margin < total) threshold.lowest = threshold_for(mine, keep + margin, threshold.likely);
  }
  for (size_t i = 0; i < mine.size(); ++i) {
    Guess& guess = guesses[layers[i]];
    guess.look = guess.close && !mine[i]->exact;
    guess.threshold = threshold;
    guess.keep = alone ? problem.keep[module] : 0;
    guess.density = cross(*mine[i], threshold.likely).density;
    // A closer look will be surer than the sample.
    const double slack = std::min(1.0, (alone        ? 0
                                        : guess.look ? 1
                                                     : kTuning.sigmas) *
                                           mine[i]->deviation) +
                         kTuning.slack;
    guess.bracket = bracket_of(*mine[i], threshold, slack, problem.layer_granularity[layers[i]], guess.look);
    guess.aside = fill(*mine[i], guess.bracket);
    guess.ladder.clear();
    if (mine[i]->exact) guess.ladder = ladder(*mine[i], guess.bracket);
  }
}

}  // namespace dimap::cpu
