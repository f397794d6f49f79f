// The device's solver on the host, against the CPU's exact engine: random problems with ties, zeros and clusters.
// Prints "ok" and the rounds it took; anything else is a failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/host.h"

using namespace dimap;
using namespace dimap::cuda;

namespace {

void require(bool holds, const char* what, int trial) {
  if (holds) return;
  std::printf("trial %d: %s\n", trial, what);
  std::exit(1);
}

struct Case {
  std::vector<std::vector<uint32_t>> layers;
  int granularity = 0;
  int64_t keep = 0;
};

Case make_case(std::mt19937& random, int trial) {
  Case c;
  const int kind = trial % 6;
  c.granularity = kind == 1 ? 16 : 0;
  const int count = 1 + static_cast<int>(random() % 5);
  int64_t total = 0;
  std::normal_distribution<float> normal;
  for (int l = 0; l < count; ++l) {
    std::vector<uint32_t> keys(random() % (trial % 7 == 0 ? 4 : 3000));
    const float spread = std::ldexp(1.0f, static_cast<int>(random() % 20) - 10);
    for (uint32_t& key : keys) {
      float value = normal(random) * spread;
      if (kind == 2 && random() % 2) value = 0;                                         // half pruned already
      if (kind == 3) value = static_cast<float>(static_cast<int>(random() % 7));        // ties everywhere
      if (kind == 4) value = 1.0f + static_cast<float>(random() % 64) * 1.1920929e-7f;  // a tight cluster
      if (kind == 5)
        value = std::ldexp(1.0f + normal(random), static_cast<int>(random() % 250) - 140);  // all exponents
      memcpy(&key, &value, 4);
      key &= 0x7FFFFFFFu;
      if (key >= kNonFinite) key = kNonFinite - 1;
      if (c.granularity) key = key >> c.granularity << c.granularity;
    }
    total += static_cast<int64_t>(keys.size());
    c.layers.push_back(std::move(keys));
  }
  c.keep = trial % 11 == 0   ? total
           : trial % 11 == 1 ? 0
                             : static_cast<int64_t>(random() % static_cast<uint32_t>(total + 1));
  return c;
}

double energy_of(const std::vector<uint32_t>& sorted, size_t end) {
  solver::Sum sum;
  sum.clear();
  for (size_t i = 0; i < end; ++i) sum.add(square(sorted[i]), 0, 2 * scale(sorted[i]));
  return sum.value();
}

// What a survey of the keys through the layer's view writes.
void survey(const std::vector<uint32_t>& keys, const View& view, Word* row, uint32_t ratio) {
  for (size_t i = 0; i < keys.size(); ++i) {
    if (ratio > 1 && (i * 2654435761u >> 7) % ratio) continue;
    const uint32_t key = keys[i];
    if (key >= view.end()) {
      ++row[1];
      split_words(square(key), 2 * scale(key), [&](int word, uint64_t term) { row[2 + word] += term; });
    } else if (key >= view.base) {
      Word* bin = row + kHead + 3 * ((key - view.base) >> view.shift);
      ++bin[0];
      bin[1] += square(key) & 0xFFFFFFu;
      bin[2] += square(key) >> 24;
    }
  }
}

int run(const Case& c, int trial, bool sampled) {
  const int bins = kLeastBins;
  const auto count = static_cast<int32_t>(c.layers.size());
  std::vector<LayerEntry> layers;
  std::vector<int32_t> order;
  int64_t total = 0;
  for (int32_t l = 0; l < count; ++l) {
    layers.push_back({static_cast<int64_t>(c.layers[l].size()), 0, c.granularity});
    order.push_back(l);
    total += layers.back().total;
  }
  const ModuleEntry module{c.keep, total, 0, 0, 0, count};
  std::vector<LayerState> states(
      count, {view_over(0, kNonFinite - 1, bins, c.granularity), 0.0, 1.0, {}, kKeyEnd, cuda::kNoTie, 4});
  ModuleState result{0.0, 1.0, 1e-15, 1.0, 0.0, 0, 0, 0};
  const int64_t stride = bins + 2, columns = columns_of(bins);
  std::vector<double> low(count * stride), high(count * stride);
  std::vector<int64_t> seen(count * stride);
  std::vector<uint32_t> begin(count), end(count);
  std::vector<Word> table(count * columns);
  SolveArgs args{{nullptr, layers.data(), &module, order.data(), 0, count, 1, 0},
                 states.data(),
                 &result,
                 table.data(),
                 {low.data(), high.data(), seen.data(), begin.data(), end.data(), stride, nullptr, nullptr, nullptr},
                 bins,
                 kTuning.sample_ratio,
                 1 << 10,
                 Goal::kGuess};
  HostExec exec;
  SolverShared shared{};
  int rounds = 0;
  for (int round = sampled ? -2 : 0; !result.decided; ++round, ++rounds) {
    require(rounds < 16 + 6 * count, "the solver does not end", trial);
    args.goal = round < 0 ? Goal::kGuess : round == 0 ? Goal::kNarrow : Goal::kDecide;
    std::fill(table.begin(), table.end(), 0);
    for (int32_t l = 0; l < count; ++l)
      survey(c.layers[l], states[l].view, table.data() + l * columns, round < 0 ? 4 : 1);
    for (int32_t l = 0; l < count; ++l) bound_layer(exec, args, l, shared);
    solve_module(exec, args, 0, search_module(args, 0), shared);
  }

  // The specification: exact scores, sorted.
  std::vector<double> scores;
  std::vector<std::vector<std::pair<uint32_t, double>>> by_layer;
  for (const auto& keys : c.layers) {
    std::vector<uint32_t> sorted = keys;
    std::sort(sorted.rbegin(), sorted.rend());
    std::vector<std::pair<uint32_t, double>> mine;
    solver::Sum sum;
    sum.clear();
    for (size_t i = 0; i < sorted.size();) {
      size_t j = i;
      for (; j < sorted.size() && sorted[j] == sorted[i]; ++j) sum.add(square(sorted[j]), 0, 2 * scale(sorted[j]));
      const double score = score64(sorted[i], sum.value());
      for (; i < j; ++i) mine.emplace_back(sorted[i], score), scores.push_back(score);
    }
    by_layer.push_back(std::move(mine));
  }
  if (c.keep == 0) {
    for (const LayerState& s : states)
      require(s.keep_from == kKeyEnd && s.tie == cuda::kNoTie, "nothing must be kept", trial);
    return rounds;
  }
  std::nth_element(scores.begin(), scores.begin() + (c.keep - 1), scores.end(), std::greater<>());
  const double threshold = scores[static_cast<size_t>(c.keep - 1)];
  require(result.threshold == threshold, "the threshold differs", trial);
  int64_t kept = 0, tied = 0;
  for (int32_t l = 0; l < count; ++l) {
    for (const auto& [key, score] : by_layer[l]) {
      const bool keeps = key >= states[l].keep_from, ties = key == states[l].tie;
      kept += keeps, tied += ties;
      require(!(keeps && ties), "a tie is kept outright", trial);
      if (score > threshold) require(keeps, "a better weight is dropped", trial);
      if (score < threshold) require(!keeps && !ties, "a worse weight is kept", trial);
      if (score == threshold) require(keeps || ties, "an equal weight is dropped", trial);
    }
  }
  require(kept + result.quota == c.keep, "the count is off", trial);
  require(result.quota >= 0 && (result.quota < tied || (result.quota == 0 && tied == 0)), "the quota is off", trial);
  return rounds;
}

}  // namespace

int main() {
  std::mt19937 random(20);
  require(energy_of({0x3F800000u, 0x40000000u}, 2) == 5.0, "1 + 4 is 5", -1);
  int most = 0;
  for (int trial = 0; trial < 600; ++trial) {
    const Case c = make_case(random, trial);
    most = std::max({most, run(c, trial, false), run(c, trial, true)});
  }
  std::printf("ok, at most %d rounds\n", most);
}
