// Finds the cuts: guesses before the deciding read, exact rounds after it, with no host in between.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/solve.cuh"
#include "cuda/survey.cuh"

namespace dimap::cuda {
namespace {

struct Shared {
  union {
    SurveyShared<> survey;
    SolveShared solve;
  };
};
static_assert(sizeof(Shared) <= 48 << 10, "what a block has without asking");

constexpr double kLeastScore = 1.0 / (uint64_t{1} << 50);  // where the first search starts: it goes below where it must

// Empties the table; the rows of layers whose bracket holds start from what the deciding read summed.
template <bool kRead>
__device__ void clear_table(const DecideArgs& a) {
  const int64_t columns = columns_of(a.solve.bins), words = a.solve.plan.layer_count * columns;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += int64_t{gridDim.x} * kThreads) {
    const int64_t layer = i / columns, column = i % columns;
    const bool summed = kRead && column < kHead && a.solve.layers[layer].bracket.holds;
    a.solve.table[i] = summed ? a.heads[layer * kHead + column] : 0;
  }
}

// A few cooperative blocks on a multiprocessor: the solver needs its registers more than it needs threads.
__global__ void __launch_bounds__(kThreads, 1) guess_kernel(const __grid_constant__ DecideArgs a) {
  __shared__ Shared shared;
  const auto grid = cooperative_groups::this_grid();
  const int64_t me = int64_t{blockIdx.x} * kThreads + threadIdx.x, all = int64_t{gridDim.x} * kThreads;
  const Plan& plan = a.solve.plan;
  for (int64_t l = me; l < plan.layer_count; l += all) {
    const LayerEntry& layer = plan.layers[l];
    uint32_t ratio = 1;
    while (ratio < static_cast<uint32_t>(a.solve.sample_ratio) && layer.total / (2 * ratio) >= kTuning.sample_least)
      ratio *= 2;
    a.solve.layers[l] = {
        view_over(0, kNonFinite - 1, a.solve.bins, layer.granularity), 0.0, 1.0, {}, kKeyEnd, kNoTie, ratio};
  }
  for (int64_t m = me; m < plan.module_count; m += all) a.solve.modules[m] = {0.0, 1.0, kLeastScore, 1.0, 0.0, 0, 0, 0};
  if (me == 0) *a.bad = 0;
  SolveArgs solve = a.solve;
  solve.goal = Goal::kGuess;
  for (int round = 0; round < 2; ++round) {
    clear_table<false>(a);
    grid.sync();
    survey<Reads::kSample>({plan, solve.layers, solve.modules, solve.table, solve.bins, 0, true, a.bad}, shared.survey);
    grid.sync();
    solve_all(solve, shared.solve, grid);
  }
  clear_table<false>(a);
}

// Surveys by what was set aside: a warp for a run of chunks. Few keys lie in the bins, so these are the table's own.
__device__ void survey_aside(const DecideArgs& a) {
  const Plan& plan = a.solve.plan;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, warps = int64_t{gridDim.x} * kWarps;
  const int64_t first = plan.chunks * warp / warps, last = plan.chunks * (warp + 1) / warps;
  if (first >= last) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t columns = columns_of(a.solve.bins);
  Above t;
  int32_t tensor = tensor_of(plan, first), layer = -1;
  Word* row = nullptr;
  for (int64_t c = first; c < last; ++c) {
    while (plan.tensors[tensor + 1].first_chunk <= c) ++tensor;
    const TensorEntry entry = plan.tensors[tensor];
    const LayerState& state = a.solve.layers[entry.layer];
    if (!state.bracket.holds || a.solve.modules[plan.layers[entry.layer].module].decided) continue;
    if (entry.layer != layer) {
      if (layer >= 0) flush_above(t, row);
      layer = entry.layer;
      row = a.solve.table + layer * columns;
      t.look_through(state.view);
    }
    const auto see = [&](uint32_t key) {
      if (key >= t.end) {
        see_above(key, t, [&](uint32_t large) { add_words(row + 2, square(large), 2 * scale(large)); });  // few
      } else if (key >= t.base) {
        Word* bin = row + kHead + 3 * static_cast<int64_t>((key - t.base) >> t.shift);
        const uint64_t energy = square(key);
        atomicAdd(bin, Word{1});
        atomicAdd(bin + 1, static_cast<Word>(energy & 0xFFFFFFu));
        atomicAdd(bin + 2, static_cast<Word>(energy >> 24));
      }
    };
    const int32_t count = a.aside.count[c];
    for_type(entry.dtype, [&]<DType kType>() {
      if (count != kOverrun) {
        const Slot<kType> slot(a.aside, c);
        for (int i = lane; i < count; i += 32) see(slot.key(i));
        return;
      }
      // The chunk itself: those above the bracket are summed already.
      const int64_t offset = entry.begin_of(c);
      const int n = entry.count_of(c);
      const auto* weights = static_cast<const storage_t<kType>*>(entry.data) + offset;
      for (int i = lane; i < n; i += 32)
        if (const uint32_t key = key_of<kType>(weights[i]); key < state.bracket.high && key >= state.bracket.low)
          see(key);
    });
  }
  if (layer >= 0) flush_above(t, row);
}

struct Left {
  bool modules, escaped, aside;  // undecided ones, and how their layers are to be surveyed
};

__device__ Left what_is_left(const SolveArgs& a) {
  bool modules = false, escaped = false, aside = false;
  for (int32_t m = static_cast<int32_t>(threadIdx.x); m < a.plan.module_count; m += kThreads)
    modules |= !a.modules[m].decided;
  for (int32_t l = static_cast<int32_t>(threadIdx.x); l < a.plan.layer_count; l += kThreads) {
    if (a.modules[a.plan.layers[l].module].decided) continue;
    (a.layers[l].bracket.holds ? aside : escaped) = true;
  }
  Left left;
  left.modules = __syncthreads_or(modules);
  left.escaped = __syncthreads_or(escaped);
  left.aside = __syncthreads_or(aside);
  return left;
}

__global__ void __launch_bounds__(kThreads, 1) finish_kernel(const __grid_constant__ DecideArgs a) {
  __shared__ Shared shared;
  const auto grid = cooperative_groups::this_grid();
  const int64_t me = int64_t{blockIdx.x} * kThreads + threadIdx.x, all = int64_t{gridDim.x} * kThreads;
  const Plan& plan = a.solve.plan;
  const int64_t columns = columns_of(a.solve.bins);
  SolveArgs solve = a.solve;
  const bool finite = *a.bad == 0;  // written by kernels before this one, and by this one after the next barrier only
  for (int64_t i = me; i < int64_t{plan.layer_count} * kHead; i += all)
    a.heads[i] = solve.table[i / kHead * columns + i % kHead];
  grid.sync();

  // Each round narrows the window of at least one layer 64-fold or settles it, so this ends; the bound is for defects.
  const int64_t most = 16 + 6 * int64_t{plan.layer_count};
  int64_t round = 0;
  for (; finite && round < most; ++round) {
    solve.goal = round == 0 ? Goal::kNarrow : Goal::kDecide;
    solve_all(solve, shared.solve, grid);
    const Left left = what_is_left(solve);
    if (!left.modules) break;
    clear_table<true>(a);
    grid.sync();
    if (left.aside) survey_aside(a);
    if (left.escaped)
      survey<Reads::kEscaped>({plan, solve.layers, solve.modules, solve.table, solve.bins, 0, true, a.bad},
                              shared.survey);
    grid.sync();
  }
  const int32_t bad = !finite ? kBadWeights : round >= most ? kBadSolve : 0;
  if (me == 0 && bad) *a.bad = bad;
  for (int64_t m = me; m < plan.module_count; m += all) {
    a.quota[m] = bad ? 0 : solve.modules[m].quota;
    if (a.thresholds)
      a.thresholds[m] = bad == kBadWeights ? kThresholdOfBadWeights
                        : bad              ? kThresholdOfBadSolve
                                           : solve.modules[m].threshold;
  }
}

// Blocks for as many chunks, layers and modules as there are, all resident.
template <typename Kernel>
cudaError_t launch_resident(Kernel kernel, const DecideArgs& args, cudaStream_t stream) {
  int64_t most = 1;
  if (const cudaError_t error = resident(kernel, &most); error != cudaSuccess) return error;
  const Plan& plan = args.solve.plan;
  const int64_t wanted = plan.chunks > plan.layer_count ? plan.chunks : plan.layer_count;
  return launch_with({.cooperative = true}, kernel,
                     blocks_for(wanted > plan.module_count ? wanted : plan.module_count, most), stream, args);
}

}  // namespace

cudaError_t guess(const DecideArgs& args, cudaStream_t stream) { return launch_resident(guess_kernel, args, stream); }

cudaError_t finish(const DecideArgs& args, cudaStream_t stream) { return launch_resident(finish_kernel, args, stream); }

}  // namespace dimap::cuda
