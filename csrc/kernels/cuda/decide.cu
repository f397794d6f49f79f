// Survey and solve on the device until every module is decided: one cooperative kernel, no host in between.
#include <cooperative_groups.h>

#include "kernels.h"
#include "launch.h"
#include "survey.cuh"

namespace dimap::cuda {
namespace {

struct Shared {
  union {
    SurveyShared survey;
    SolverShared solver;
  };
};

__device__ void solve_all(const SolveArgs& a, SolverShared& s) {
  BlockExec exec;
  for (int32_t m = static_cast<int32_t>(blockIdx.x); m < a.plan.module_count; m += static_cast<int32_t>(gridDim.x))
    if (!a.modules[m].decided) solve_module(exec, a, m, s);
}

__device__ void zero(const DecideArgs& a) {
  const int64_t words = a.solve.plan.layer_count * (kHead + 3 * static_cast<int64_t>(a.solve.bins));
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += int64_t{gridDim.x} * kThreads)
    a.table[i] = 0;
}

__device__ bool any_undecided(const DecideArgs& a) {
  bool mine = false;
  for (int32_t m = static_cast<int32_t>(threadIdx.x); m < a.solve.plan.module_count; m += kThreads)
    mine |= !a.solve.modules[m].decided;
  return __syncthreads_or(mine);
}

// One block or two on a multiprocessor keep enough loads in flight, and leave the solver its registers.
__global__ void __launch_bounds__(kThreads, 1) decide_kernel(const __grid_constant__ DecideArgs a) {
  __shared__ Shared shared;
  const auto grid = cooperative_groups::this_grid();
  const int64_t me = int64_t{blockIdx.x} * kThreads + threadIdx.x, all = int64_t{gridDim.x} * kThreads;
  const Plan& plan = a.solve.plan;
  for (int64_t l = me; l < plan.layer_count; l += all) {
    const LayerEntry& layer = plan.layers[l];
    uint32_t ratio = 1;
    while (ratio < static_cast<uint32_t>(kTuning.sample_ratio) && layer.total / (2 * ratio) >= kTuning.sample_least)
      ratio *= 2;
    a.solve.layers[l] = {view_over(0, kNonFinite - 1, a.solve.bins, layer.granularity), kKeyEnd, kNoTie, ratio};
  }
  for (int64_t m = me; m < plan.module_count; m += all) a.solve.modules[m] = {0.0, 1.0, 0.0, 0, 0, 0};
  if (me == 0) *a.bad = 0;
  const SurveyArgs seen{plan, a.solve.layers, a.solve.modules, a.table, a.solve.bins, a.bad};

  // Two looks at a sample, to guess where the cuts are, then whole surveys. Each of these narrows the window of at
  // least one layer 64-fold or settles it, so this ends; the bound is for defects.
  SolveArgs solve = a.solve;
  const int64_t most = 16 + 6 * int64_t{plan.layer_count};
  int64_t round = 0;
  for (; round < most; ++round) {
    solve.guess = round < 2;
    zero(a);
    grid.sync();
    if (solve.guess)
      survey<true>(seen, shared.survey);
    else
      survey<false>(seen, shared.survey);
    grid.sync();
    if (*static_cast<volatile int32_t*>(a.bad)) break;
    solve_all(solve, shared.solver);
    grid.sync();
    if (!solve.guess && !any_undecided(a)) break;
  }
  grid.sync();
  if (round >= most && me == 0) *a.bad = kBadSolve;
  grid.sync();
  const int32_t bad = *static_cast<volatile int32_t*>(a.bad);
  if (a.thresholds == nullptr) return;
  for (int64_t m = me; m < plan.module_count; m += all)
    a.thresholds[m] = bad == kBadWeights ? kThresholdOfBadWeights
                      : bad              ? kThresholdOfBadSolve
                                         : a.solve.modules[m].threshold;
}

__global__ void __launch_bounds__(kThreads, 1) survey_kernel(const __grid_constant__ SurveyArgs a) {
  __shared__ SurveyShared shared;
  survey<false>(a, shared);
}

}  // namespace

cudaError_t decide(const DecideArgs& args, cudaStream_t stream) {
  int64_t most = 1;
  if (const cudaError_t error = resident(decide_kernel, &most); error != cudaSuccess) return error;
  const int64_t chunks = args.solve.plan.chunks, modules = args.solve.plan.module_count;
  return launch_with(true, 0, decide_kernel, blocks_for(chunks > modules ? chunks : modules, most), stream, args);
}

cudaError_t survey(const Plan& plan, const LayerState* layers, Word* table, int bins, int32_t* bad,
                   cudaStream_t stream) {
  int64_t most = 1;
  if (const cudaError_t error = resident(survey_kernel, &most); error != cudaSuccess) return error;
  return launch(survey_kernel, blocks_for(plan.chunks, most), stream,
                SurveyArgs{plan, layers, nullptr, table, bins, bad});
}

}  // namespace dimap::cuda
