// The solver on a grid: all modules at once, no host in between.
#pragma once

#include <cooperative_groups.h>

#include "cuda/block.cuh"
#include "cuda/solver.h"

namespace dimap::cuda {

struct SearchShared {
  static constexpr int kIntervals = kTuning.most_bins + 2;
  double bounds[2][kIntervals];  // low and high, of the block's first layer
  int64_t seen[kIntervals];
  Search search;
  int passed[2];
  int32_t open;
};

struct SolveShared {
  union {
    SolverShared solver;
    SearchShared search;
  };
};
static_assert(2 * kProbes == kThreads, "a thread for a probe");

// Moves a module's search on by a round of counts and clears these; all threads of the block, one for a probe.
__device__ inline void move_on(const SolveArgs& a, int32_t m, Word* counts, SearchShared& s) {
  const int which = static_cast<int>(threadIdx.x) / kProbes, probe = static_cast<int>(threadIdx.x) % kProbes;
  if (probe == 0) s.passed[which] = kProbes;
  __syncthreads();
  if (static_cast<int64_t>(counts[threadIdx.x]) < solver::wanted(a, a.plan.modules[m], which))
    atomicMin(&s.passed[which], probe);
  counts[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) solver::next_search(s.search, a, m, s.passed);
}

// Searches the thresholds of all modules at once, in rounds: a block for a module moves its search on, then all blocks
// count, each in its layers, a thread for a probe. The results are in scratch.searches.
__device__ inline void search_all(const SolveArgs& a, SearchShared& s, const cooperative_groups::grid_group& grid) {
  const int32_t layers = a.plan.layer_count;
  const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  const int me = static_cast<int>(threadIdx.x), which = me / kProbes, probe = me % kProbes;
  // Bounds of the first layer at hand: most blocks have no other.
  const bool at_hand = block < layers && static_cast<int>(a.layers[block].view.bins) + 2 <= SearchShared::kIntervals;
  if (at_hand) {
    const solver::Layer layer = solver::layer_of(a, block);
    for (int i = me; i < layer.intervals(); i += kThreads) {
      s.bounds[0][i] = layer.low[i], s.bounds[1][i] = layer.high[i];
      s.seen[i] = layer.seen[i];
    }
  }
  for (int round = 0;; ++round) {
    for (int32_t m = block; m < a.plan.module_count; m += blocks) {
      Word* counts = a.scratch.counts + int64_t{m} * 2 * kProbes;
      __syncthreads();
      if (me == 0) s.search = round ? a.scratch.searches[m] : solver::start_search(a, m);
      __syncthreads();
      if (round == 0)
        counts[me] = 0;
      else if (s.search.open)
        move_on(a, m, counts, s);
      if (me == 0) {
        a.scratch.searches[m] = s.search;
        if (s.search.open) atomicMax(&a.scratch.open[round % 2], 1);
      }
    }
    if (block == 0 && me == 0) a.scratch.open[(round + 1) % 2] = 0;
    grid.sync();
    if (a.scratch.open[round % 2] == 0) return;
    for (int32_t l = block; l < layers; l += blocks) {
      const int32_t m = a.plan.layers[l].module;
      const Search& search = a.scratch.searches[m];
      if (!search.open) continue;
      const double threshold = solver::threshold_of(search, which, probe);
      int64_t count;
      if (l == block && at_hand) {
        count = solver::count_at(s.bounds[which], s.seen, static_cast<int>(a.layers[l].view.bins) + 2, threshold);
      } else {
        const solver::Layer layer = solver::layer_of(a, l);
        count = solver::count_at(which ? layer.high : layer.low, layer.seen, layer.intervals(), threshold);
      }
      if (count) atomicAdd(a.scratch.counts + int64_t{m} * 2 * kProbes + me, static_cast<Word>(count));
    }
    grid.sync();
  }
}

// Bounds of all layers, a block for a layer, the search, then the modules, a block for a module. All blocks of the
// grid.
__device__ inline void solve_all(const SolveArgs& a, SolveShared& s, const cooperative_groups::grid_group& grid) {
  BlockExec exec;
  for (int32_t l = static_cast<int32_t>(blockIdx.x); l < a.plan.layer_count; l += static_cast<int32_t>(gridDim.x))
    if (!a.modules[a.plan.layers[l].module].decided) bound_layer(exec, a, l, s.solver);
  if (blockIdx.x == 0 && threadIdx.x == 0) a.scratch.open[0] = 0;
  grid.sync();
  search_all(a, s.search, grid);
  __syncthreads();
  for (int32_t m = static_cast<int32_t>(blockIdx.x); m < a.plan.module_count; m += static_cast<int32_t>(gridDim.x))
    if (!a.modules[m].decided) solve_module(exec, a, m, a.scratch.searches[m], s.solver);
  grid.sync();
}

}  // namespace dimap::cuda
