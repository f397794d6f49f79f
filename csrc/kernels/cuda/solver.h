// The solver of ../solve.h as phases for a block of threads: the same bounds, the same exact scores, the same cuts.
//
// `Exec` runs a phase: each(n, f) calls f(0) ... f(n - 1) in any order and then waits for all; one(f) calls f once and
// then waits. On the device that is a block and its barrier, on the host a loop: tests run the same code without a GPU.
#pragma once

#include <cmath>

#include "plan.h"

namespace dimap::cuda {

constexpr int kProbes = 16;      // thresholds tried at a time
constexpr int kSegments = 256;   // of a layer's intervals, for the running sums
constexpr int kStrides = 16;     // of segments
constexpr int kExactParts = 32;  // of a layer's bins above those that need exact scores

// Intervals of a layer, largest magnitudes first: 0 is what lies above the window, then the bins, then what lies below.
struct Scratch {
  double *low, *high;     // [layers, stride] bounds of the scores inside
  int64_t* seen;          // [layers, stride] weights up to and including the interval
  uint32_t *begin, *end;  // [layers] intervals that may hold the threshold
  int64_t stride;         // bins + 2
};

struct SolverShared {
  union {
    struct {
      double energy[kSegments];
      int64_t count[kSegments];
      double stride_energy[kStrides];
      int64_t stride_count[kStrides];
    } bound;
    struct {
      Word count[2 * kProbes];
      Word yes[2], no[2], from[2], step[2];
      Word kept, tied, next, current;
      int32_t go_on, undecided, hinted;
    } find;
  };
};

// What a solve is for.
enum class Goal : int32_t {
  kGuess,   // the table is of a sample: find windows that should hold the cuts, decide nothing
  kNarrow,  // windows are wide: bounds may be coarse where they do not decide
  kDecide,
};

struct SolveArgs {
  Plan plan;
  LayerState* layers;
  ModuleState* modules;
  Word* table;  // [layers, kHead + 3 * bins]; the sums above a window change where exact scores are found
  Scratch scratch;
  int32_t bins;
  int32_t most_aside;  // weights of a whole chunk that a slot holds; 0: brackets are not for setting aside
  Goal goal;
};

namespace solver {

constexpr double kSlack = 1e-9;  // far above the rounding of the float64 running sums

DIMAP_HD uint64_t bits_of(double x) {
  uint64_t b;
  memcpy(&b, &x, 8);
  return b;
}
DIMAP_HD double double_of(uint64_t b) {
  double x;
  memcpy(&x, &b, 8);
  return x;
}

DIMAP_HD double upper_bound(uint32_t key, double energy_above) {
  if (key == 0) return 0.0;
  const double s = squared_value(key);
  const double bound = s / (energy_above + s) * (1 + kSlack);
  return bound < 1.0 ? bound : 1.0;
}
DIMAP_HD double lower_bound(uint32_t key, double energy) {
  return key == 0 || energy == 0.0 ? 0.0 : squared_value(key) / energy * (1 - kSlack);
}

// Exact sums, unit 2^-298; dimap::Energy for the device.
struct Sum {
  static constexpr int kLimbs = 10;
  uint64_t limb[kLimbs];

  DIMAP_HD void clear() {
    for (int i = 0; i < kLimbs; ++i) limb[i] = 0;
  }
  // Adds (low + high · 2^64) · 2^bit.
  DIMAP_HD void add(uint64_t low, uint64_t high, int bit) {
    const int first = bit / 64, shift = bit % 64;
    const uint64_t parts[3] = {low << shift, shift ? high << shift | low >> (64 - shift) : high,
                               shift ? high >> (64 - shift) : 0};
    uint64_t carry = 0;
    for (int i = 0; i + first < kLimbs && (i < 3 || carry); ++i) {
      const uint64_t part = i < 3 ? parts[i] : 0;
      uint64_t& to = limb[first + i];
      to += part;
      uint64_t out = to < part;
      to += carry;
      out += to < carry;
      carry = out;
    }
  }
  DIMAP_HD bool bit(int i) const { return limb[i / 64] >> (i % 64) & 1; }
  // The nearest float64, ties to even.
  DIMAP_HD double value() const {
    int top = kLimbs - 1;
    while (top >= 0 && limb[top] == 0) --top;
    if (top < 0) return 0.0;
    int width = 64 * top;
    for (uint64_t v = limb[top]; v; v >>= 1) ++width;
    if (width <= 53) return static_cast<double>(limb[0]) * power_of_two(-298);
    const int drop = width - 53, from = drop / 64, shift = drop % 64;
    uint64_t kept = limb[from] >> shift;
    if (shift && from + 1 < kLimbs) kept |= limb[from + 1] << (64 - shift);
    kept &= (uint64_t{1} << 53) - 1;
    const int below = drop - 1;  // the bit that says half
    bool sticky = false;
    for (int i = 0; i < below / 64; ++i) sticky |= limb[i] != 0;
    if (below % 64) sticky |= limb[below / 64] << (64 - below % 64) != 0;
    if (bit(below) && (sticky || (kept & 1))) ++kept;
    return static_cast<double>(kept) * power_of_two(drop - 298);
  }
};

struct Layer {  // one layer's part of the arguments
  Word* row;
  View view;
  int granularity;
  int32_t number;
  uint32_t ratio;
  int64_t total;
  double least, most;  // what is proven to be kept scores at least this, what is proven to be dropped at most this
  double *low, *high;
  int64_t* seen;

  DIMAP_HD int intervals() const { return static_cast<int>(view.bins) + 2; }
  DIMAP_HD int bin_of(int i) const { return static_cast<int>(view.bins) - i; }
  DIMAP_HD uint32_t first(int i) const {
    if (i == 0) {
      const uint32_t end = view.end() < kNonFinite ? view.end() : kNonFinite;
      return end > view.above_first ? end : view.above_first;
    }
    return i == intervals() - 1 ? 0 : view.base + (static_cast<uint32_t>(bin_of(i)) << view.shift);
  }
  DIMAP_HD uint32_t last(int i) const {
    if (i == 0) return kNonFinite - 1;
    if (i == intervals() - 1) {
      const uint32_t end = view.base < view.below_end ? view.base : view.below_end;
      return end ? end - 1 : 0;
    }
    const uint32_t key = first(i);
    return static_cast<int>(view.shift) <= granularity
               ? key
               : key + (uint32_t{1} << view.shift) - (uint32_t{1} << granularity);
  }
  DIMAP_HD const Word* bin(int i) const { return row + kHead + 3 * bin_of(i); }
  DIMAP_HD int64_t count(int i) const {  // not for the interval below
    return static_cast<int64_t>(i == 0 ? row[1] : *bin(i)) * ratio;
  }
  DIMAP_HD double energy(int i) const {
    double sum = 0;
    if (i == 0) {
      for (int w = kWords - 1; w >= 0; --w)
        if (row[2 + w]) sum += static_cast<double>(row[2 + w]) * power_of_two(32 * w - 298);
    } else {
      const Word* b = bin(i);
      if (b[0])
        sum = (static_cast<double>(b[1]) + static_cast<double>(b[2]) * 16777216.0) *
              power_of_two(2 * scale(first(i)) - 298);
    }
    return sum * ratio;
  }
  DIMAP_HD int64_t before(int i) const { return i > 0 ? seen[i - 1] : 0; }
  // First interval for which the test fails; the test must hold for a head of the intervals.
  template <typename Test>
  DIMAP_HD int head(Test&& test) const {
    int from = 0, to = intervals();
    while (from < to) {
      const int middle = (from + to) / 2;
      if (test(middle))
        from = middle + 1;
      else
        to = middle;
    }
    return from;
  }
};

DIMAP_HD Layer layer_of(const SolveArgs& a, int32_t l) {
  const LayerState& state = a.layers[l];
  const ModuleState& module = a.modules[a.plan.layers[l].module];
  const bool proven = state.view.proven != 0;
  const int64_t at = l * a.scratch.stride;
  return {a.table + l * (kHead + 3 * static_cast<int64_t>(a.bins)),
          state.view,
          a.plan.layers[l].granularity,
          l,
          a.goal == Goal::kGuess ? state.ratio : 1u,
          a.plan.layers[l].total,
          proven ? double_of(bits_of(module.high) + 1) : 0.0,
          proven && module.low > 0 ? double_of(bits_of(module.low) - 1) : 2.0,
          a.scratch.low + at,
          a.scratch.high + at,
          a.scratch.seen + at};
}

// Running sums and bounds of one segment of a layer, from the sums before it.
DIMAP_HD void bound_segment(const Layer& layer, int from, int to, double energy, int64_t seen) {
  const int n = layer.intervals();
  for (int i = from; i < to; ++i) {
    double low, high;
    if (i == n - 1) {
      const int64_t rest = layer.total - seen;
      low = 0.0;
      high = rest > 0 ? upper_bound(layer.last(i), energy) : 0.0;
      // An earlier survey may have known more than the sum: weights that are equal share their energy.
      if (high > layer.most) high = layer.most;
      if (rest > 0) seen += rest;
    } else {
      const int64_t count = layer.count(i);
      const uint32_t first = layer.first(i), last = layer.last(i);
      high = i == 0 ? 1.0 : upper_bound(last, energy);
      energy += layer.energy(i);
      seen += count;
      // Empty intervals get bounds too, falling like the others', so that binary searches work.
      low = energy == 0.0 ? (count ? 0.0 : 1.0) : lower_bound(first, energy);
      if (i == 0 && low < layer.least) low = layer.least;
      if (count && i > 0 && first == last) {  // one magnitude, one score
        const double score = low * (1 + 3 * kSlack);
        high = score < 1.0 ? score : 1.0;
      }
    }
    layer.low[i] = low;
    layer.high[i] = high;
    layer.seen[i] = seen;
  }
}

// Adds the exact energy of one part of the bins above the unsure intervals to the layer's row.
template <typename Exec>
DIMAP_HD void add_exact_part(Exec& exec, const Layer& layer, int begin, int part) {
  const int size = (begin + kExactParts - 1) / kExactParts;
  const int from = part * size > 1 ? part * size : 1, to = (part + 1) * size < begin ? (part + 1) * size : begin;
  uint64_t low = 0, high = 0;  // bins of one exponent, in units of 2^(2 * at - 298)
  int at = -1;
  auto flush = [&] {
    const auto add = [&](int word, uint64_t term) { exec.add(layer.row + 2 + word, static_cast<Word>(term)); };
    if (low) split_words(low, 2 * at, add);
    if (high) split_words(high, 2 * at + 64, add);
  };
  for (int i = from; i < to; ++i) {
    const Word* bin = layer.bin(i);
    if (bin[0] == 0) continue;
    const int exponent = scale(layer.first(i));
    if (exponent != at) {
      if (at >= 0) flush();
      low = high = 0;
      at = exponent;
    }
    low += bin[1];
    high += low < bin[1];
    const uint64_t part_of_high = bin[2] << 24;
    low += part_of_high;
    high += (bin[2] >> 40) + (low < part_of_high);
  }
  if (at >= 0) flush();
}

// Exact scores of the unsure intervals, each of one magnitude, into `low`. The row holds the energy above them.
DIMAP_HD void exact_scores(const Layer& layer, int begin, int end) {
  Sum sum;
  sum.clear();
  for (int w = 0; w < kWords; ++w)
    if (layer.row[2 + w]) sum.add(layer.row[2 + w], 0, 32 * w);
  if (begin == 0) layer.low[0] = score64(layer.first(0), sum.value());  // what lies above the window is one magnitude
  for (int i = begin > 1 ? begin : 1; i < end && i < layer.intervals() - 1; ++i) {
    const Word* bin = layer.bin(i);
    if (bin[0] == 0) continue;
    const int exponent = scale(layer.first(i));
    sum.add(bin[1], 0, 2 * exponent);
    sum.add(bin[2], 0, 2 * exponent + 24);
    layer.low[i] = score64(layer.first(i), sum.value());
  }
  if (end == layer.intervals()) layer.low[end - 1] = 0.0;  // zeros: the only single magnitude below a window
}

}  // namespace solver

// Bounds of the scores in the intervals of layer l: a block for a layer, before its module is solved.
template <typename Exec>
DIMAP_HD void bound_layer(Exec& exec, const SolveArgs& a, int32_t l, SolverShared& shared) {
  using namespace solver;
  auto& s = shared.bound;
  const Layer layer = layer_of(a, l);
  const int n = layer.intervals() - 1, size = (n + kSegments - 1) / kSegments, each = kSegments / kStrides;
  exec.each(kSegments, [&](int64_t j) {
    const int from = static_cast<int>(j) * size, to = from + size < n ? from + size : n;
    double energy = 0;
    int64_t count = 0;
    for (int i = from; i < to; ++i) energy += layer.energy(i), count += layer.count(i);
    s.energy[j] = energy, s.count[j] = count;
  });
  // To the sums before each segment: inside strides, over strides, both.
  exec.each(kStrides, [&](int64_t k) {
    double energy = 0;
    int64_t count = 0;
    for (int64_t j = k * each; j < (k + 1) * each; ++j) {
      const double e = s.energy[j];
      const int64_t c = s.count[j];
      s.energy[j] = energy, s.count[j] = count;
      energy += e, count += c;
    }
    s.stride_energy[k] = energy, s.stride_count[k] = count;
  });
  exec.one([&] {
    double energy = 0;
    int64_t count = 0;
    for (int k = 0; k < kStrides; ++k) {
      const double e = s.stride_energy[k];
      const int64_t c = s.stride_count[k];
      s.stride_energy[k] = energy, s.stride_count[k] = count;
      energy += e, count += c;
    }
  });
  exec.each(kSegments, [&](int64_t j) {
    const int from = static_cast<int>(j) * size;
    int to = from + size < n ? from + size : n;
    if (from < n && to == n) to = n + 1;  // and what lies below the window
    bound_segment(layer, from, to, s.stride_energy[j / each] + s.energy[j], s.stride_count[j / each] + s.count[j]);
  });
}

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
