// The solver of core/solve.h as phases for a block of threads: the same bounds, the same exact scores, the same cuts.
//
// `Exec` runs a phase: each(n, f) calls f(0) ... f(n - 1) in any order and then waits for all; one(f) calls f once and
// then waits. On the device that is a block and its barrier, on the host a loop: tests run the same code without a GPU.
#pragma once

#include <cmath>

#include "cuda/bounds.h"
#include "cuda/exact.h"

namespace dimap::cuda {

namespace solver {

// Where a module's search stands before any count. Relative to the score, bounds become as near as 2^-10, 2^-18 or
// 2^-30.
DIMAP_HD Word close_enough(Goal goal) {
  return Word{1} << (goal == Goal::kGuess ? 42 : goal == Goal::kNarrow ? 34 : 22);
}

// Weights that must lie at a threshold for it to count as `yes`.
DIMAP_HD int64_t wanted(const SolveArgs& a, const ModuleEntry& module, int which) {
  if (a.goal != Goal::kGuess || module.total == 0) return module.keep;
  // 4.5 deviations of a count in a sample of neighbours that are alike
  const double total = static_cast<double>(module.total), keep = static_cast<double>(module.keep);
  const double variance = 4.0 * a.sample_ratio * keep * (1 - keep / total);
  const auto margin = static_cast<int64_t>(4.5 * std::sqrt(variance)) + 1;
  return which == 0 ? module.keep + margin : module.keep - margin;
}

// Thresholds to try: first where the threshold should be, then all over what is left.
DIMAP_HD void spread(Search& s, int which, const ModuleState& known) {
  const Word first = bits_of(known.hint_low), last = bits_of(known.hint_high);
  const bool hinted = s.hinted && first > s.yes[which] && last < s.no[which] && last - first >= kProbes;
  s.step[which] = hinted ? (last - first) / (kProbes - 1) : (s.no[which] - s.yes[which]) / (kProbes + 1);
  s.from[which] = hinted ? first : s.yes[which] + s.step[which];
}

DIMAP_HD Search start_search(const SolveArgs& a, int32_t m) {
  const ModuleEntry& module = a.plan.modules[m];
  const ModuleState& known = a.modules[m];
  const bool guess = a.goal == Goal::kGuess;
  Search s;
  for (int which = 0; which < 2; ++which) {
    s.yes[which] = bits_of(guess ? 0.0 : known.low);
    s.no[which] = bits_of(guess ? 1.0 : known.high) + 1;
  }
  if (wanted(a, module, 0) > module.total) s.no[0] = s.yes[0] = 0;
  if (wanted(a, module, 1) < 1) s.yes[1] = s.no[1] = bits_of(1.0);
  s.open = !known.decided && module.keep > 0;
  s.hinted = 1;
  for (int which = 0; which < 2; ++which) spread(s, which, known);
  return s;
}

DIMAP_HD double threshold_of(const Search& s, int which, int probe) {
  return double_of(s.from[which] + s.step[which] * static_cast<Word>(probe));
}

// Weights of a layer whose bound is at least the threshold; bound, seen: [intervals].
DIMAP_HD int64_t count_at(const double* bound, const int64_t* seen, int intervals, double threshold) {
  int from = 0, to = intervals;
  while (from < to) {
    const int middle = (from + to) / 2;
    if (bound[middle] >= threshold)
      from = middle + 1;
    else
      to = middle;
  }
  return from > 0 ? seen[from - 1] : 0;
}

// What a round of counts says: `passed` of the probes, from the first on, had as many as are wanted.
DIMAP_HD void next_search(Search& s, const SolveArgs& a, int32_t m, const int passed[2]) {
  const Word close = close_enough(a.goal);
  s.open = s.hinted = 0;
  for (int which = 0; which < 2; ++which) {
    if (s.no[which] - s.yes[which] > close) {
      if (passed[which] < kProbes) s.no[which] = s.from[which] + s.step[which] * static_cast<Word>(passed[which]);
      if (passed[which] > 0) s.yes[which] = s.from[which] + s.step[which] * static_cast<Word>(passed[which] - 1);
      if (s.no[which] - s.yes[which] > close) s.open = 1;
    }
    spread(s, which, a.modules[m]);
  }
}

}  // namespace solver

// Solves module m, whose layers have their bounds and whose threshold was searched: writes its cuts, or the windows to
// look through next.
template <typename Exec>
DIMAP_HD void solve_module(Exec& exec, const SolveArgs& a, int32_t m, const Search& found, SolverShared& shared) {
  using namespace solver;
  auto& s = shared.find;
  const bool guess = a.goal == Goal::kGuess;
  const ModuleEntry module = a.plan.modules[m];
  const int32_t* order = a.plan.order + module.first_layer;
  const int64_t layers = module.layers;
  if (module.keep == 0) {
    exec.each(layers, [&](int64_t j) {
      LayerState& state = a.layers[order[j]];
      state.view = {kNonFinite, 23, 0, kKeyEnd, 0};  // nothing to look for
      if (guess) state.bracket = {kNonFinite, kNonFinite, kNonFinite, 1};
      state.keep_from = kKeyEnd;
      state.tie = kNoTie;
    });
    exec.one([&] {
      ModuleState& out = a.modules[m];
      out.threshold = double_of(0x7FF8000000000000u);
      out.quota = 0;
      out.decided = !guess;
    });
    return;
  }

  const double low = double_of(found.yes[0]), high = double_of(found.no[1]);
  exec.one([&] { s.undecided = 0, s.kept = 0; });

  // What lies between the two.
  exec.each(layers, [&](int64_t j) {
    const Layer layer = layer_of(a, order[j]);
    double lowest = low, highest = high;
    if (guess) {  // the sample's energy is off, too
      const double taken = static_cast<double>(layer.total) / layer.ratio;
      const double off = layer.ratio == 1 ? 0.0 : 8.0 / std::sqrt(taken > 1 ? taken : 1);
      lowest = low / (1 + off), highest = high * (1 + off);
    }
    const int begin = layer.head([&](int i) { return layer.low[i] > highest; });
    int end = layer.head([&](int i) { return layer.high[i] >= lowest; });
    if (end < begin) end = begin;
    a.scratch.begin[layer.number] = static_cast<uint32_t>(begin);
    a.scratch.end[layer.number] = static_cast<uint32_t>(end);
    bool single = !guess;
    for (int i = begin; single && i < end; ++i)
      single = layer.first(i) == layer.last(i) || layer.seen[i] == layer.before(i);
    if (!single) exec.add(&s.undecided, 1);
    exec.add(&s.kept, static_cast<Word>(layer.before(begin)));
  });

  if (s.undecided) {
    exec.each(layers, [&](int64_t j) {
      const Layer layer = layer_of(a, order[j]);
      const int begin = static_cast<int>(a.scratch.begin[layer.number]),
                end = static_cast<int>(a.scratch.end[layer.number]);
      const int64_t kept = layer.before(begin), maybe = layer.before(end);
      const int after = layer.head([&](int i) { return layer.seen[i] <= maybe; });  // next nonempty ones
      const int before = kept ? layer.head([&](int i) { return layer.seen[i] < kept; }) : layer.intervals();
      const bool any_after = after < layer.intervals(), any_before = before < layer.intervals();
      const uint32_t below_end = any_after ? layer.last(after) + 1 : 0;
      View view{below_end, 23, 0, kKeyEnd, 0};
      if (maybe > kept) {
        const int top = layer.head([&](int i) { return layer.seen[i] <= kept; });
        const int bottom = layer.head([&](int i) { return layer.seen[i] < maybe; });
        view = view_over(layer.first(bottom), layer.last(top), a.bins, layer.granularity);
      } else {
        view.shift = static_cast<uint32_t>(layer.granularity);
        view.base = below_end >> view.shift << view.shift;
        if (view.base < below_end) view.base += uint32_t{1} << view.shift;
      }
      LayerState& state = a.layers[layer.number];
      if (guess) {
        const double share =
            static_cast<double>(maybe - kept) / (layer.total > 1 ? static_cast<double>(layer.total) : 1);
        const int64_t chunk = layer.total < kChunk ? layer.total : kChunk;
        state.bracket = {view.base, view.end(), view.base + (view.end() - view.base) / 2,
                         share * static_cast<double>(chunk) < 0.9 * a.most_aside};
      } else {
        view.below_end = below_end, view.above_first = any_before ? layer.first(before) : kNonFinite;
        state.least = any_before ? layer.low[before] : 0.0, state.most = any_after ? layer.high[after] : 1.0;
        if (view.base < state.bracket.low || view.end() > state.bracket.high) state.bracket.holds = 0;
      }
      state.view = view;
    });
    exec.one([&] {
      ModuleState& known = a.modules[m];
      known.hint_low = low, known.hint_high = high < 1.0 ? high : 1.0;
      if (!guess) known.low = known.hint_low, known.high = known.hint_high;
    });
    return;
  }

  exec.each(layers * kExactParts, [&](int64_t j) {
    const Layer layer = layer_of(a, order[j / kExactParts]);
    const int begin = static_cast<int>(a.scratch.begin[layer.number]),
              end = static_cast<int>(a.scratch.end[layer.number]);
    if (layer.before(end) > layer.before(begin)) add_exact_part(exec, layer, begin, static_cast<int>(j % kExactParts));
  });
  exec.each(layers, [&](int64_t j) {
    const Layer layer = layer_of(a, order[j]);
    const int begin = static_cast<int>(a.scratch.begin[layer.number]),
              end = static_cast<int>(a.scratch.end[layer.number]);
    if (layer.before(end) > layer.before(begin)) exact_scores(layer, begin, end);
  });
  exec.one([&] {
    s.current = ~Word{0};
    s.next = s.tied = 0;
    s.go_on = 1;
  });
  while (s.go_on) {  // groups of equal scores, best first
    exec.each(layers, [&](int64_t j) {
      const Layer layer = layer_of(a, order[j]);
      Word best = 0;  // bits of the score and one
      for (uint32_t i = a.scratch.begin[layer.number]; i < a.scratch.end[layer.number]; ++i) {
        if (layer.seen[i] == layer.before(static_cast<int>(i))) continue;
        const Word bits = bits_of(layer.low[i]) + 1;
        if (bits < s.current && bits > best) best = bits;
      }
      if (best) exec.max(&s.next, best);
    });
    exec.each(layers, [&](int64_t j) {
      const Layer layer = layer_of(a, order[j]);
      for (uint32_t i = a.scratch.begin[layer.number]; i < a.scratch.end[layer.number]; ++i) {
        const int64_t count = layer.seen[i] - layer.before(static_cast<int>(i));
        if (count && bits_of(layer.low[i]) + 1 == s.next) exec.add(&s.tied, static_cast<Word>(count));
      }
    });
    exec.one([&] {
      s.current = s.next;
      s.go_on = s.next != 0 && s.kept + s.tied < static_cast<Word>(module.keep);
      if (s.go_on) {
        s.kept += s.tied;
        s.next = s.tied = 0;
      }
    });
  }
  const Word group = s.current;
  const int64_t quota = module.keep - static_cast<int64_t>(s.kept);
  const bool whole = quota == static_cast<int64_t>(s.tied);
  exec.each(layers, [&](int64_t j) {
    const Layer layer = layer_of(a, order[j]);
    const int begin = static_cast<int>(a.scratch.begin[layer.number]),
              end = static_cast<int>(a.scratch.end[layer.number]);
    const int64_t maybe = layer.before(end);
    const int after = layer.head([&](int i) { return layer.seen[i] <= maybe; });
    uint32_t keep_from = after < layer.intervals() ? layer.last(after) + 1 : 0, tie = kNoTie;
    for (int i = begin; i < end; ++i) {
      if (layer.seen[i] == layer.before(i)) continue;
      const Word bits = bits_of(layer.low[i]) + 1;
      const uint32_t key = layer.first(i);
      if (bits == group && !whole) tie = key;
      if (bits < group || (bits == group && !whole)) keep_from = keep_from > key + 1 ? keep_from : key + 1;
    }
    LayerState& state = a.layers[layer.number];
    state.keep_from = keep_from;
    state.tie = tie;
    if (keep_from < state.bracket.low || keep_from > state.bracket.high || (tie != kNoTie && tie < state.bracket.low))
      state.bracket.holds = 0;
  });
  exec.one([&] {
    ModuleState& out = a.modules[m];
    out.threshold = double_of(group - 1);
    out.quota = whole ? 0 : quota;
    out.decided = 1;
  });
}

}  // namespace dimap::cuda
