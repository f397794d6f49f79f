#include "cpu/select/decision.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "core/wire.h"
#include "cpu/select/bracket.h"
#include "cpu/select/count.h"
#include "cpu/select/sample.h"

namespace dimap::cpu {
namespace {

// Tuning, as data: measured with benchmarks/bench_select.py.
constexpr struct {
  int64_t bins = 1024;                      // of a window over what was set aside, at most,
  int64_t bins_least = 64;                  // at least,
  double bins_share = 1.0 / 16;             // and for each weight set aside
  int64_t survey_bins = 4096;               // of a window over all weights, at most
  int64_t survey_bytes = int64_t{8} << 20;  // all tables of a survey, about
  int64_t aside_share = 16;                 // at most one weight in this many is set aside,
  int64_t aside_least = 1 << 17;            // this many in any case,
  double layer_share = 0.25;                // a layer of which more would be set aside is looked at otherwise
  double missed_share = 1.0 / 8;            // a module of which more was guessed wrong is counted as a whole
  int rounds = 64;                          // far more than any input needs
} kTuning;

bool any(const Flags& flags) {
  return std::any_of(flags.begin(), flags.end(), [](uint8_t f) { return f != 0; });
}

int64_t survey_bins_of(const Problem& problem) {
  const auto layers = static_cast<int64_t>(std::max<size_t>(problem.layers(), 1));
  return std::clamp(kTuning.survey_bytes / static_cast<int64_t>(sizeof(Bin)) / layers, int64_t{kMinBins},
                    kTuning.survey_bins);
}

}  // namespace

Decision::Decision(const Problem& problem, const Pool& pool, const Exchange* exchange, Keeps keeps,
                   std::span<uint8_t* const> masks, int64_t aside_most)
    : cuts(problem.layers()),
      modules(problem.modules()),
      problem_(problem),
      pool_(pool),
      exchange_(problem.ranks > 1 ? exchange : nullptr),
      loader_(problem, pool.workers()),
      reading_(problem, loader_, pool, keeps),
      read_(problem.layers()),
      layers_(problem.modules()),
      keep_(problem.keep),
      bins_(problem.layers()),
      windows_(problem.layers()),
      survey_bins_(survey_bins_of(problem)) {
  const int64_t total = std::accumulate(problem.module_total.begin(), problem.module_total.end(), int64_t{0});
  budget_ = total / kTuning.aside_share + kTuning.aside_least;
  if (keeps == Keeps::kCounts) budget_ = std::min(budget_, aside_most);
  for (size_t l = 0; l < problem.layers(); ++l) layers_[problem.layer_module[l]].push_back(static_cast<int32_t>(l));
  unsettled_ = layers_;
  decide(masks);
  for (size_t l = 0; l < problem.layers(); ++l) read_[l] = read_[l] && suffices(l);
}

std::vector<int64_t> Decision::quotas() const {
  std::vector<int64_t> quota;
  for (const ModuleCut& m : modules) quota.push_back(m.quota);
  return quota;
}

void Decision::decide(std::span<uint8_t* const> masks) {
  std::vector<Sketch> sketches = sample_layers(problem_, reading_.guesses, loader_, pool_, exchange_);
  Flags open(problem_.modules(), 1), counted(problem_.modules());
  const auto bracket = [&](const Flags& which) {
    pool_.for_each(static_cast<int64_t>(problem_.modules()), [&](int64_t m, int) {
      if (which[m]) bracket_module(problem_, m, layers_[m], sketches, reading_.guesses);
    });
  };
  const auto count = [&](const Flags& which) {
    ++readings;
    count_layers(problem_, layers_of(which), loader_, pool_, exchange_, sketches);
    bracket(which);
    for (size_t m = 0; m < which.size(); ++m) counted[m] |= which[m];
  };
  bracket(open);
  Flags unsure(problem_.modules());
  for (size_t m = 0; m < unsure.size(); ++m) {
    // A module that keeps all has its threshold at its smallest weight, which no sample shows.
    unsure[m] = problem_.keep[m] == problem_.module_total[m] && problem_.keep[m] > 0;
    for (const int32_t l : layers_[m]) unsure[m] |= !readable(l);
  }
  if (any(unsure)) count(unsure);
  read(open, masks);
  solve_open(open, /*surveys=*/false);
  // Of thousands of layers some few lie outside their brackets: these alone are surveyed below.
  std::vector<int64_t> missed(problem_.modules());
  for (size_t l = 0; l < problem_.layers(); ++l)
    if (!read_[l]) missed[problem_.layer_module[l]] += problem_.layer_total[l];
  for (size_t m = 0; m < open.size(); ++m)
    unsure[m] = open[m] && !counted[m] &&
                static_cast<double>(missed[m]) > kTuning.missed_share * static_cast<double>(problem_.module_total[m]);
  if (any(unsure)) {
    Flags left = unsure;
    count(unsure);
    read(unsure, masks);
    solve_open(left, /*surveys=*/false);
    for (size_t m = 0; m < open.size(); ++m)
      if (unsure[m]) open[m] = left[m];
  }
  sketches.clear();
  solve_open(open, /*surveys=*/true);
}

Flags Decision::layers_of(const Flags& modules_wanted) const {
  Flags wanted(problem_.layers());
  for (size_t l = 0; l < wanted.size(); ++l) wanted[l] = modules_wanted[problem_.layer_module[l]];
  return wanted;
}

bool Decision::readable(int32_t layer) const {
  const auto total = static_cast<double>(problem_.layer_total[layer]);
  return reading_.guesses[layer].aside <= kTuning.layer_share * total + 64 || reading_.counts(layer);
}

// Reads the layers of the modules, but for modules that would set aside more than the budget allows: the largest.
void Decision::read(const Flags& which, std::span<uint8_t* const> masks) {
  Flags wanted = layers_of(which);
  std::vector<int64_t> expected(problem_.modules());
  for (size_t l = 0; l < wanted.size(); ++l) {
    wanted[l] = wanted[l] && readable(static_cast<int32_t>(l));
    if (wanted[l])
      expected[problem_.layer_module[l]] += static_cast<int64_t>(reading_.expected(static_cast<int32_t>(l))) + 1;
  }
  int64_t budget = budget_;  // each rank may have another
  if (exchange_) {           // all leave out the same ones
    exchange_->sum(expected);
    exchange_->sum({&budget, 1});
  }
  while (std::accumulate(expected.begin(), expected.end(), int64_t{0}) > budget) {
    const auto largest = std::max_element(expected.begin(), expected.end());
    *largest = 0;
    for (const int32_t l : layers_[largest - expected.begin()]) wanted[l] = 0;
  }
  int64_t over = 0;
  if (any(wanted)) {
    ++readings;
    over = !reading_.read(wanted, masks, budget_);
  }
  if (exchange_) exchange_->sum({&over, 1});
  for (size_t l = 0; l < wanted.size(); ++l) {
    if (!which[problem_.layer_module[l]]) continue;
    const Guess& guess = reading_.guesses[l];
    read_[l] = !over && wanted[l];
    bins_[l] = read_[l] ? bins_of(guess) : 0;
    windows_[l] = window_over(guess.bracket.low, std::max(guess.bracket.low, guess.bracket.high - 1),
                              read_[l] ? bins_[l] : survey_bins_, problem_.layer_granularity[l]);
  }
}

// Tables of small layers must not take more room than what they count.
int64_t Decision::bins_of(const Guess& guess) {
  auto bins = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(guess.aside * kTuning.bins_share) + 1));
  bins = std::clamp(bins, kTuning.bins_least, kTuning.bins);
  const uint32_t exponents = (guess.bracket.high >> 23) - (guess.bracket.low >> 23);
  return exponents >= static_cast<uint32_t>(kTuning.bins_least) / 2 ? std::max<int64_t>(bins, kMinBins) : bins;
}

// Solves what can be solved of the open modules, and closes it. Without surveys, a module is left open where a layer
// was not read or its cut is seen to lie outside its bracket.
void Decision::solve_open(Flags& open, bool surveys) {
  if (!any(open)) return;
  Flags active = open;
  std::vector<LayerTable> tables(problem_.layers());
  std::vector<int64_t> first(problem_.layers() + 1);
  std::partial_sum(bins_.begin(), bins_.end(), first.begin() + 1);
  std::vector<Bin> bins(static_cast<size_t>(first.back()));
  for (int round = 0;; ++round) {
    if (round == kTuning.rounds) throw std::logic_error("dimap: the cuts did not converge");
    std::vector<int32_t> layers;  // to be looked at in this round
    Flags surveyed(problem_.layers());
    for (size_t m = 0; m < active.size(); ++m) {
      const auto is_read = [&](int32_t l) { return read_[l] != 0; };
      active[m] = active[m] && (surveys || std::ranges::all_of(unsettled_[m], is_read));
      if (active[m]) layers.insert(layers.end(), unsettled_[m].begin(), unsettled_[m].end());
    }
    if (!any(active)) return;
    pool_.for_each(static_cast<int64_t>(layers.size()), [&](int64_t i, int) {
      const int32_t l = layers[i];
      if (!read_[l]) {
        surveyed[l] = 1;
        return;
      }
      tables[l] = reading_.table(l, windows_[l],
                                 std::span(bins).subspan(static_cast<size_t>(first[l]), static_cast<size_t>(bins_[l])));
    });
    Survey seen;
    if (any(surveyed)) {
      ++readings;
      seen = survey(problem_, windows_, survey_bins_, surveyed, loader_, pool_);
      for (const int32_t l : layers)
        if (surveyed[l]) tables[l] = seen.tables[l];
    }
    if (exchange_) add_up(layers, tables, bins, seen);
    pool_.for_each(static_cast<int64_t>(problem_.modules()), [&](int64_t m, int) {
      if (active[m]) active[m] = open[m] = !solve_module(m, tables);
    });
  }
}

// Adds up the tables of the layers over the ranks. Their bins lie in `bins` or in `seen`.
void Decision::add_up(std::span<const int32_t> layers, std::span<LayerTable> tables, std::vector<Bin>& bins,
                      Survey& seen) const {
  std::vector<int64_t> numbers;
  const auto for_tables = [&](auto&& body) {
    size_t at = 0;
    for (const int32_t l : layers) {
      const auto columns = static_cast<size_t>(wire_columns(static_cast<int64_t>(tables[l].bins.size())));
      body(tables[l], at, columns);
      at += columns;
    }
  };
  for_tables([&](const LayerTable& table, size_t at, size_t columns) {
    numbers.resize(at + columns);
    write_table(table, numbers.data() + at);
  });
  exchange_->sum(numbers);
  for_tables([&](LayerTable& table, size_t at, size_t) {
    const int64_t total = table.total;  // of all ranks already
    std::vector<Bin>& home =
        !bins.empty() && table.bins.data() >= bins.data() && table.bins.data() < bins.data() + bins.size() ? bins
                                                                                                           : seen.bins;
    read_sums(numbers.data() + at, table, {home.data() + (table.bins.data() - home.data()), table.bins.size()});
    table.total = total;
  });
}

bool Decision::solve_module(int64_t module, const std::vector<LayerTable>& tables) {
  std::vector<int32_t>& layers = unsettled_[module];
  std::vector<LayerTable> mine;
  mine.reserve(layers.size());
  for (const int32_t l : layers) mine.push_back(tables[l]);
  std::vector<Cut> found(layers.size());
  std::vector<Next> next(layers.size());
  modules[module] = solve(mine, keep_[module], found, next);
  if (modules[module].decided) {
    for (size_t i = 0; i < layers.size(); ++i) cuts[layers[i]] = found[i];
    return true;
  }
  // What was read of a layer says no more of weights outside its bracket; but coarse bins of other layers may be why
  // the cut seems to lie there.
  bool closer = false;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int32_t l = layers[i];
    if (next[i].escaped && read_[l]) continue;
    if (next[i].settled) {
      cuts[l] = {next[i].window.below_end, Cut::kNoTie};
      keep_[module] -= next[i].kept;
      closer = true;
    }
    closer |= next[i].window.base != windows_[l].base || next[i].window.shift != windows_[l].shift;
    windows_[l] = next[i].window;
  }
  for (size_t i = 0; i < layers.size() && !closer; ++i) {
    const int32_t l = layers[i];
    if (!next[i].escaped || !read_[l]) continue;
    read_[l] = 0;
    windows_[l] = window_over(0, kNonFinite - 1, survey_bins_, problem_.layer_granularity[l]);
  }
  size_t left = 0;
  for (size_t i = 0; i < layers.size(); ++i)
    if (!next[i].settled) layers[left++] = layers[i];
  layers.resize(left);
  return false;
}

// Whether a layer keeps only weights that the reading marked or set aside: not its atom, not zeros.
bool Decision::suffices(size_t l) const {
  const Bracket& b = reading_.guesses[l].bracket;
  const Cut& cut = cuts[l];
  const bool atom_kept =
      b.atom != Bracket::kNoAtom && reading_.layers[l].atoms && (b.atom >= cut.keep_from || b.atom == cut.tie);
  return !atom_kept && cut.keep_from >= b.low && cut.keep_from <= b.high && cut.tie >= b.low;
}

}  // namespace dimap::cpu
