#include "engine.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "emit.h"
#include "reading.h"
#include "sample.h"
#include "survey.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  int64_t bins = 1024;                      // of a window over what was set aside, at most,
  int64_t bins_least = 64;                  // at least,
  double bins_share = 1.0 / 16;             // and for each weight set aside
  int64_t survey_bins = 4096;               // of a window over all weights, at most
  int64_t survey_bytes = int64_t{8} << 20;  // all tables of a survey, about
  int64_t aside_share = 16;                 // at most one weight in this many is set aside, and
  int64_t aside_least = 1 << 17;            // this many in any case
  double layer_share = 0.25;                // a layer of which more would be set aside is surveyed instead
  int rounds = 64;                          // far more than any input needs
} kTuning;

using Flags = std::vector<uint8_t>;

bool any(const Flags& flags) {
  return std::any_of(flags.begin(), flags.end(), [](uint8_t f) { return f != 0; });
}

// Finds the cuts. Each layer is looked at through what the one read set aside, until its cut is seen to lie elsewhere:
// then through surveys of that layer.
class Decision {
 public:
  Decision(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool)
      : cuts(problem.layers()),
        modules(problem.modules()),
        problem_(problem),
        pool_(pool),
        reading_(problem, {}, pool),
        read_(problem.layers()),
        bins_(problem.layers()) {
    read_once(masks);
    solve_all();
    for (size_t l = 0; l < problem.layers(); ++l) read_[l] = read_[l] && suffices(l);
  }

  std::vector<Cut> cuts;           // [layers]
  std::vector<ModuleCut> modules;  // [modules]

  Reading* reading() { return &reading_; }
  const Flags& read() const { return read_; }  // [layers] whose masks the reading has written, but for those set aside
  std::vector<int64_t> quotas() const {
    std::vector<int64_t> quota;
    for (const ModuleCut& m : modules) quota.push_back(m.quota);
    return quota;
  }

 private:
  // Tables of small layers must not take more room than what they count.
  int64_t bins_of(double aside, const Bracket& bracket) const {
    auto bins = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(aside * kTuning.bins_share) + 1));
    bins = std::clamp(bins, kTuning.bins_least, kTuning.bins);
    const bool wide = (bracket.high >> 23) - (bracket.low >> 23) >= static_cast<uint32_t>(kTuning.bins_least) / 2;
    return wide ? std::max<int64_t>(bins, kMinBins) : bins;
  }

  void read_once(std::span<uint8_t* const> masks) {
    const int64_t total = std::accumulate(problem_.module_total.begin(), problem_.module_total.end(), int64_t{0});
    const int64_t budget = total / kTuning.aside_share + kTuning.aside_least;
    Guess guess = guess_brackets(problem_, pool_);
    double expected = 0;
    for (size_t l = 0; l < problem_.layers(); ++l) {
      const auto m = static_cast<size_t>(problem_.layer_module[l]);
      // A module that keeps all has its threshold at its smallest weight, which no sample shows.
      const bool whole = problem_.keep[m] == problem_.module_total[m] && problem_.keep[m] > 0;
      read_[l] = !whole && guess.aside[l] <= kTuning.layer_share * static_cast<double>(problem_.layer_total[l]) + 64;
      if (read_[l]) expected += guess.aside[l];
      bins_[l] = bins_of(guess.aside[l], guess.brackets[l]);
    }
    reading_.brackets = std::move(guess.brackets);
    if (expected > static_cast<double>(budget) || !reading_.read(read_, masks, budget))
      std::fill(read_.begin(), read_.end(), 0);
  }

  void solve_all() {
    const auto count = static_cast<int64_t>(problem_.layers());
    const int64_t survey_bins =
        std::clamp(kTuning.survey_bytes / (static_cast<int64_t>(sizeof(Bin)) * std::max<int64_t>(count, 1)),
                   int64_t{kMinBins}, kTuning.survey_bins);
    std::vector<std::vector<int32_t>> layers(problem_.modules());
    std::vector<Window> windows(problem_.layers());
    for (size_t l = 0; l < problem_.layers(); ++l) {
      const Bracket& b = reading_.brackets[l];
      const int unit = problem_.layer_granularity[l];
      layers[problem_.layer_module[l]].push_back(static_cast<int32_t>(l));
      windows[l] = read_[l] ? window_over(b.low, std::max(b.low, b.high - 1), bins_[l], unit)
                            : window_over(0, kNonFinite - 1, survey_bins, unit);
    }
    Flags open(problem_.modules(), 1);
    std::vector<LayerTable> tables(problem_.layers());
    std::vector<int64_t> first(problem_.layers() + 1);
    std::partial_sum(bins_.begin(), bins_.end(), first.begin() + 1);
    std::vector<Bin> bins(static_cast<size_t>(first.back()));
    for (int round = 0; any(open); ++round) {
      if (round == kTuning.rounds) throw std::logic_error("dimap: the cuts did not converge");
      Flags surveyed(problem_.layers());
      for (size_t l = 0; l < problem_.layers(); ++l) surveyed[l] = open[problem_.layer_module[l]] && !read_[l];
      pool_.for_each(count, [&](int64_t l, int) {
        if (!open[problem_.layer_module[l]] || !read_[l]) return;
        tables[l] =
            reading_.table(static_cast<int32_t>(l), windows[l],
                           std::span(bins).subspan(static_cast<size_t>(first[l]), static_cast<size_t>(bins_[l])));
      });
      Survey seen;
      if (any(surveyed)) {
        seen = survey(problem_, windows, survey_bins, surveyed, pool_);
        for (size_t l = 0; l < problem_.layers(); ++l)
          if (surveyed[l]) tables[l] = seen.tables[l];
      }
      pool_.for_each(static_cast<int64_t>(problem_.modules()), [&](int64_t m, int) {
        if (open[m]) open[m] = !solve_module(m, layers[m], tables, windows, survey_bins);
      });
    }
  }

  bool solve_module(int64_t module, const std::vector<int32_t>& layers, const std::vector<LayerTable>& tables,
                    std::vector<Window>& windows, int64_t survey_bins) {
    std::vector<LayerTable> mine;
    for (const int32_t l : layers) mine.push_back(tables[l]);
    std::vector<Cut> found(layers.size());
    std::vector<Next> next(layers.size());
    modules[module] = solve(mine, problem_.keep[module], found, next);
    for (size_t i = 0; i < layers.size(); ++i) {
      const int32_t l = layers[i];
      if (modules[module].decided) {
        cuts[l] = found[i];
        continue;
      }
      windows[l] = next[i].window;
      if (next[i].escaped && read_[l]) {  // the guess missed: look at this layer itself
        read_[l] = 0;
        windows[l] = window_over(0, kNonFinite - 1, survey_bins, problem_.layer_granularity[l]);
      }
    }
    return modules[module].decided;
  }

  // Whether a layer keeps only weights that the reading marked or set aside: not its atom, not zeros.
  bool suffices(size_t l) const {
    const Bracket& b = reading_.brackets[l];
    const Cut& cut = cuts[l];
    const bool atom_kept =
        b.atom != Bracket::kNoAtom && reading_.layers[l].atoms && (b.atom >= cut.keep_from || b.atom == cut.tie);
    return !atom_kept && cut.keep_from >= b.low && cut.keep_from <= b.high && cut.tie >= b.low;
  }

  const Problem& problem_;
  const Pool& pool_;
  Reading reading_;
  Flags read_;
  std::vector<int64_t> bins_;  // [layers] of a window over what was set aside
};

}  // namespace

std::vector<ModuleCut> select(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool) {
  Decision decision(problem, masks, pool);
  std::vector<int64_t> quota = decision.quotas();
  emit(problem, decision.cuts, quota, masks, decision.reading(), decision.read(), pool);
  return std::move(decision.modules);
}

std::vector<ModuleCut> prune(const Problem& problem, const Pool& pool) {
  Decision decision(problem, {}, pool);
  std::vector<int64_t> quota = decision.quotas();
  zero(problem, decision.cuts, quota, decision.reading(), decision.read(), pool);
  return std::move(decision.modules);
}

}  // namespace dimap::cpu
