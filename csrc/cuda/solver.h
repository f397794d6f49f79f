// The solver of ../solve.h as phases for a block of threads: the same bounds, the same exact scores, the same cuts.
//
// `Exec` runs a phase: each(n, f) calls f(0) ... f(n - 1) in any order and then waits for all; one(f) calls f once and
// then waits. On the device that is a block and its barrier, on the host a loop: tests run the same code without a GPU.
#pragma once

#include <cmath>

#include "cuda/bounds.h"
#include "cuda/exact.h"

namespace dimap::cuda {

// Solves module m, whose layers have their bounds: writes its cuts, or the windows to look through next.
template <typename Exec>
DIMAP_HD void solve_module(Exec& exec, const SolveArgs& a, int32_t m, SolverShared& shared) {
  using namespace solver;
  auto& s = shared.find;
  const bool guess = a.goal == Goal::kGuess;
  const ModuleEntry module = a.plan.modules[m];
  const int32_t* order = a.plan.order + module.first_layer;
  const int64_t layers = module.layers;
  if (module.keep == 0) {
    exec.each(layers, [&](int64_t j) {
      LayerState& state = a.layers[order[j]];
      state.view = {kNonFinite, 23, 0, kKeyEnd, 0, 0};  // nothing to look for
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

  // The keep-th largest lower bound (0) and upper bound (1), each as near as `close` units in the last place, on the
  // safe side. Relative to the score that is 2^-10, 2^-18 or 2^-30.
  const Word close = Word{1} << (guess ? 42 : a.goal == Goal::kNarrow ? 34 : 22);
  int64_t wanted[2] = {module.keep, module.keep};
  if (guess) {  // 4.5 deviations of a count in a sample of neighbours that are alike
    const double total = static_cast<double>(module.total), keep = static_cast<double>(module.keep);
    const double variance = 4.0 * kTuning.sample_ratio * keep * (1 - keep / total);
    const auto margin = static_cast<int64_t>(4.5 * std::sqrt(variance)) + 1;
    wanted[0] += margin;
    wanted[1] -= margin;
  }
  // Thresholds to try: first where the threshold should be, then all over what is left.
  auto spread = [&](int which) {
    const ModuleState& known = a.modules[m];
    const Word first = bits_of(known.hint_low), last = bits_of(known.hint_high);
    const bool hinted = s.hinted && first > s.yes[which] && last < s.no[which] && last - first >= kProbes;
    s.step[which] = hinted ? (last - first) / (kProbes - 1) : (s.no[which] - s.yes[which]) / (kProbes + 1);
    s.from[which] = hinted ? first : s.yes[which] + s.step[which];
  };
  exec.one([&] {
    const ModuleState& known = a.modules[m];
    for (int which = 0; which < 2; ++which) {
      s.yes[which] = bits_of(guess ? 0.0 : known.low);
      s.no[which] = bits_of(guess ? 1.0 : known.high) + 1;
    }
    if (wanted[0] > module.total) s.no[0] = s.yes[0] = 0;
    if (wanted[1] < 1) s.yes[1] = s.no[1] = bits_of(1.0);
    s.hinted = 1;
    for (int which = 0; which < 2; ++which) spread(which);
    for (Word& c : s.count) c = 0;
    s.go_on = 1;
    s.undecided = 0;
    s.kept = 0;
  });
  while (s.go_on) {
    exec.each(layers * 2 * kProbes, [&](int64_t j) {
      const int which = static_cast<int>(j / kProbes % 2), probe = static_cast<int>(j % kProbes);
      const Layer layer = layer_of(a, order[j / (2 * kProbes)]);
      const double* bound = which ? layer.high : layer.low;
      const double t = double_of(s.from[which] + s.step[which] * static_cast<Word>(probe));
      const int n = layer.head([&](int i) { return bound[i] >= t; });
      exec.add(&s.count[which * kProbes + probe], static_cast<Word>(layer.before(n)));
    });
    exec.one([&] {
      s.go_on = s.hinted = 0;
      for (int which = 0; which < 2; ++which) {
        if (s.no[which] - s.yes[which] > close) {
          for (int probe = 0; probe < kProbes; ++probe) {
            const Word t = s.from[which] + s.step[which] * static_cast<Word>(probe);
            if (static_cast<int64_t>(s.count[which * kProbes + probe]) < wanted[which]) {
              s.no[which] = t;
              break;
            }
            s.yes[which] = t;
          }
          if (s.no[which] - s.yes[which] > close) s.go_on = 1;
        }
        for (int probe = 0; probe < kProbes; ++probe) s.count[which * kProbes + probe] = 0;
        spread(which);
      }
    });
  }
  const double low = double_of(s.yes[0]), high = double_of(s.no[1]);

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
    bool single = true;
    for (int i = begin; i < end; ++i) single &= layer.seen[i] == layer.before(i) || layer.first(i) == layer.last(i);
    if (!single || guess) exec.add(&s.undecided, 1);
    exec.add(&s.kept, static_cast<Word>(layer.before(begin)));
  });

  if (s.undecided) {
    exec.each(layers, [&](int64_t j) {
      const Layer layer = layer_of(a, order[j]);
      const int begin = static_cast<int>(a.scratch.begin[layer.number]),
                end = static_cast<int>(a.scratch.end[layer.number]);
      const int64_t kept = layer.before(begin), maybe = layer.before(end);
      const int after = layer.head([&](int i) { return layer.seen[i] <= maybe; });  // next nonempty ones
      const int before = kept ? layer.head([&](int i) { return layer.seen[i] < kept; }) : -1;
      const uint32_t below_end = after < layer.intervals() ? layer.last(after) + 1 : 0;
      const uint32_t above_first = before >= 0 ? layer.first(before) : kNonFinite;
      View view{below_end, 23, 0, kKeyEnd, 0, 0};
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
        view.below_end = below_end, view.above_first = above_first, view.proven = 1;
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
