// What the host does with plans and with the solver's phases, where it runs them itself.
#pragma once

#include <algorithm>
#include <ranges>
#include <span>
#include <utility>
#include <vector>

#include "cuda/rows.h"

namespace dimap::cuda {

// Runs the solver's phases one after another (see solver.h).
struct HostExec {
  template <typename F>
  void each(int64_t n, F&& f) {
    for (int64_t i = n - 1; i >= 0; --i) f(i);  // any order must do
  }
  template <typename F>
  void one(F&& f) {
    f();
  }
  void add(Word* to, Word value) { *to += value; }
  void add(int32_t* to, int32_t value) { *to += value; }
  void max(Word* to, Word value) { *to = std::max(*to, value); }
};

// Sets each module's part of the layers in order of their modules, and returns these. layer_module: [layers].
inline std::vector<int32_t> order_layers(std::span<const int32_t> layer_module, std::span<ModuleEntry> modules) {
  for (const int32_t m : layer_module) ++modules[static_cast<size_t>(m)].layers;
  std::vector<int32_t> next;
  int32_t place = 0;
  for (ModuleEntry& m : modules) next.push_back(m.first_layer = std::exchange(place, place + m.layers));
  std::vector<int32_t> order(layer_module.size());
  for (size_t l = 0; l < order.size(); ++l)
    order[static_cast<size_t>(next[static_cast<size_t>(layer_module[l])]++)] = static_cast<int32_t>(l);
  return order;
}

// Searches the threshold of module m, whose layers have their bounds, as the blocks of a grid do.
inline Search search_module(const SolveArgs& a, int32_t m) {
  const ModuleEntry& module = a.plan.modules[m];
  Search s = solver::start_search(a, m);
  while (s.open) {
    int passed[2];
    for (int which = 0; which < 2; ++which) {
      const int64_t wanted = solver::wanted(a, module, which);
      const auto enough = [&](int probe) {
        int64_t count = 0;
        for (int32_t j = 0; j < module.layers; ++j) {
          const solver::Layer layer = solver::layer_of(a, a.plan.order[module.first_layer + j]);
          count += solver::count_at(which ? layer.high : layer.low, layer.seen, layer.intervals(),
                                    solver::threshold_of(s, which, probe));
        }
        return count >= wanted;
      };
      passed[which] = *std::ranges::partition_point(std::views::iota(0, kProbes), enough);
    }
    solver::next_search(s, a, m, passed);
  }
  return s;
}

// The operator `solve`; the rows have been checked.
inline void solve_rows(const RowArgs& args) {
  const SolveArgs& a = args.solve;
  HostExec exec;
  SolverShared shared{};
  for (int32_t l = 0; l < a.plan.layer_count; ++l) take_layer(args, l);
  for (int32_t m = 0; m < a.plan.module_count; ++m) take_module(exec, args, m, shared);
  for (int32_t l = 0; l < a.plan.layer_count; ++l) bound_layer(exec, a, l, shared);
  for (int32_t m = 0; m < a.plan.module_count; ++m) {
    solve_module(exec, a, m, search_module(a, m), shared);
    give_module(args, m);
  }
  for (int32_t l = 0; l < a.plan.layer_count; ++l) give_layer(args, l);
}

}  // namespace dimap::cuda
