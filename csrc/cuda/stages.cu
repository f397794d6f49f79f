// The stages survey and solve, and the cuts of emit, as operators of their own: their rows stay on the device, and of
// what they are refused for the host learns in one word.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/solve.cuh"
#include "cuda/survey.cuh"

namespace dimap::cuda {
namespace {

// The windows' part from bin `first` on that a block can hold, as views. A window that may not be used: an empty one.
__global__ void views_kernel(const __grid_constant__ Plan plan, const int64_t* windows, LayerState* layers, int bins,
                             int first, int32_t* bad) {
  const int64_t l = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (l >= plan.layer_count) return;
  const int64_t* w = windows + l * kWindowRow;
  if (fault_of(w) != WindowFault::kNone || w[2] > plan.layers[l].granularity) {
    atomicMax(bad, kBadRows);
    layers[l].view = {kKeyEnd, 0, 0, kKeyEnd, 0};
    return;
  }
  const int left = bins - first;
  layers[l].view = view_through(w, first, left < kTuning.most_bins ? left : kTuning.most_bins);
}

__global__ void __launch_bounds__(kThreads, 1) survey_kernel(const __grid_constant__ SurveyArgs a) {
  __shared__ SurveyShared<> shared;
  survey<Reads::kAll>(a, shared);
}

__global__ void __launch_bounds__(kThreads, 1) solve_kernel(const __grid_constant__ RowArgs a, int32_t* bad) {
  __shared__ SolveShared shared;
  const auto grid = cooperative_groups::this_grid();
  const auto me = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x);
  const auto all = static_cast<int32_t>(gridDim.x * kThreads);
  const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  const Plan& plan = a.solve.plan;
  BlockExec exec;
  for (int32_t l = me; l < plan.layer_count; l += all)
    if (!take_layer(a, l)) atomicMax(bad, kBadRows);
  for (int32_t m = block; m < plan.module_count; m += blocks)
    if (!take_module(exec, a, m, shared.solver) && threadIdx.x == 0) atomicMax(bad, kBadRows);
  grid.sync();
  if (*bad != 0) return;
  solve_all(a.solve, shared, grid);
  for (int32_t l = me; l < plan.layer_count; l += all) give_layer(a, l);
  for (int32_t m = me; m < plan.module_count; m += all) give_module(a, m);
}

__global__ void cuts_kernel(const int64_t* cuts, LayerState* layers, int64_t count, int32_t* bad) {
  const int64_t l = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (l >= count) return;
  const int64_t* cut = cuts + 2 * l;
  if (!is_cut(cut)) atomicMax(bad, kBadRows);
  layers[l].keep_from = static_cast<uint32_t>(cut[0]);
  layers[l].tie = cut[1] < 0 ? kNoTie : static_cast<uint32_t>(cut[1]);
}

unsigned blocks_of_threads(int64_t count) { return static_cast<unsigned>((count + kThreads) / kThreads); }

}  // namespace

cudaError_t survey(const Plan& plan, const int64_t* windows, LayerState* layers, Word* table, int bins, int32_t* bad,
                   cudaStream_t stream) {
  int64_t most = 1;
  cudaError_t error = resident(survey_kernel, &most);
  for (int first = 0; error == cudaSuccess && first < bins; first += kTuning.most_bins) {
    error = launch(views_kernel, blocks_of_threads(plan.layer_count), stream, plan, windows, layers, bins, first, bad);
    if (error == cudaSuccess)
      error = launch(survey_kernel, blocks_for(plan.chunks, most), stream,
                     SurveyArgs{plan, layers, nullptr, table, bins, first, first + kTuning.most_bins >= bins, bad});
  }
  return error;
}

cudaError_t solve(const RowArgs& args, int32_t* bad, cudaStream_t stream) {
  int64_t most = 1;
  if (const cudaError_t error = resident(solve_kernel, &most); error != cudaSuccess) return error;
  const int64_t work = std::max<int64_t>(args.solve.plan.layer_count, args.solve.plan.module_count);
  return launch_with({.cooperative = true}, solve_kernel, blocks_for(work, most), stream, args, bad);
}

cudaError_t take_cuts(const int64_t* cuts, LayerState* layers, int64_t count, int32_t* bad, cudaStream_t stream) {
  return launch(cuts_kernel, blocks_of_threads(count), stream, cuts, layers, count, bad);
}

}  // namespace dimap::cuda
