// The operator `solve`: rows of int64 as stages exchange them (core/wire.h) to what the solver works on, and back. The
// same steps on the host and on the device, so both find the same cuts and the same windows to look through next.
#pragma once

#include "cuda/solver.h"

namespace dimap::cuda {

constexpr int kWindowRow = 7;  // columns of a window's row

// The first requirement that a window's row does not meet.
enum class WindowFault { kNone, kBase, kGranularity, kKeys, kScores };
DIMAP_HD WindowFault fault_of(const int64_t* w) {
  if (w[1] < 0 || w[1] > 23 || w[0] < 0 || w[0] >= int64_t{kKeyEnd} || w[0] % (int64_t{1} << w[1]) != 0)
    return WindowFault::kBase;
  if (w[2] < 0 || w[2] > 23) return WindowFault::kGranularity;
  if (w[3] < 0 || w[3] > int64_t{kKeyEnd} || w[4] < 0 || w[4] > int64_t{kKeyEnd}) return WindowFault::kKeys;
  const double below = double_of(static_cast<uint64_t>(w[5])), above = double_of(static_cast<uint64_t>(w[6]));
  return below >= 0 && below <= 1 && above >= 0 && above <= 1 ? WindowFault::kNone : WindowFault::kScores;
}

// At most `most` bins of a window, from `first` on; those beyond all keys are left out.
DIMAP_HD View view_through(const int64_t* w, int64_t first, int64_t most) {
  const int64_t start = w[0] + (first << w[1]), base = start < int64_t{kKeyEnd} ? start : int64_t{kKeyEnd};
  const int64_t fit = (int64_t{kKeyEnd} - base) >> w[1];
  return {static_cast<uint32_t>(base), static_cast<uint32_t>(w[1]), static_cast<uint32_t>(fit < most ? fit : most),
          static_cast<uint32_t>(w[3]), static_cast<uint32_t>(w[4])};
}

DIMAP_HD bool is_cut(const int64_t* cut) { return cut[0] >= 0 && cut[0] <= int64_t{kKeyEnd} && cut[1] < cut[0]; }

struct RowArgs {
  SolveArgs solve;         // its table: a copy of the caller's; what the rows say of layers and modules is filled in
  LayerEntry* layers;      // [layers] those of solve.plan: totals, granularities
  ModuleEntry* modules;    // [modules] those of solve.plan: totals
  const int64_t* windows;  // [layers, kWindowRow]
  int64_t* cuts;           // [layers, 2] out: keep_from, tie; -1 where there is none
  int64_t* quota;          // [modules] out: -1 where nothing is decided
  double* thresholds;      // [modules] out
  int64_t* next;           // [layers, kWindowRow] out
};

// Reads the rows of layer l. False: its window may not be used.
DIMAP_HD bool take_layer(const RowArgs& a, int32_t l) {
  const int64_t* w = a.windows + int64_t{l} * kWindowRow;
  if (fault_of(w) != WindowFault::kNone) return false;
  a.layers[l].total = static_cast<int64_t>(a.solve.table[l * columns_of(a.solve.bins)]);
  a.layers[l].granularity = static_cast<int32_t>(w[2]);
  a.solve.layers[l] = {view_through(w, 0, a.solve.bins),
                       double_of(static_cast<uint64_t>(w[6])),
                       double_of(static_cast<uint64_t>(w[5])),
                       {},
                       kKeyEnd,
                       kNoTie,
                       1};
  return true;
}

// Sums up module m, whose layers' rows need not be read. False: it cannot keep so many. All threads of a block.
template <typename Exec>
DIMAP_HD bool take_module(Exec& exec, const RowArgs& a, int32_t m, SolverShared& shared) {
  Word& sum = shared.find.kept;
  const ModuleEntry& module = a.modules[m];
  exec.one([&] { sum = 0; });
  exec.each(module.layers, [&](int64_t j) {
    const int64_t l = a.solve.plan.order[module.first_layer + j];
    exec.add(&sum, a.solve.table[l * columns_of(a.solve.bins)]);
  });
  const auto total = static_cast<int64_t>(sum);
  exec.one([&] {
    a.modules[m].total = total;
    a.solve.modules[m] = {0.0, 1.0, 0.0, 1.0, 0.0, 0, 0, 0};
  });
  return module.keep >= 0 && module.keep <= total;
}

DIMAP_HD void give_layer(const RowArgs& a, int32_t l) {
  const LayerState& state = a.solve.layers[l];
  const int64_t* w = a.windows + int64_t{l} * kWindowRow;
  int64_t *cut = a.cuts + int64_t{l} * 2, *next = a.next + int64_t{l} * kWindowRow;
  cut[0] = cut[1] = -1;
  if (a.solve.modules[a.layers[l].module].decided) {
    cut[0] = state.keep_from;
    if (state.tie != kNoTie) cut[1] = state.tie;
    for (int i = 0; i < kWindowRow; ++i) next[i] = w[i];
    return;
  }
  next[0] = state.view.base;
  next[1] = state.view.shift;
  next[2] = w[2];
  next[3] = state.view.below_end;
  next[4] = state.view.above_first;
  next[5] = static_cast<int64_t>(bits_of(state.most));
  next[6] = static_cast<int64_t>(bits_of(state.least));
}

DIMAP_HD void give_module(const RowArgs& a, int32_t m) {
  const ModuleState& state = a.solve.modules[m];
  a.quota[m] = state.decided ? state.quota : -1;
  a.thresholds[m] = state.decided ? state.threshold : double_of(0x7FF8000000000000u);
}

}  // namespace dimap::cuda
