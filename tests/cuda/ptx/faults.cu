// One small kernel that is right, and again with one fault of each kind that the checks are to find.
#include <cooperative_groups.h>

#include "cuda/launch.h"

namespace {

using dimap::cuda::kThreads;

enum class Fault { kNone, kBarrier, kWarpBarrier, kFence, kGridBarrier, kVector, kUnsetShared, kUnsetWord, kLane };

struct Args {
  const uint32_t* in;   // [blocks, 4 * kThreads]
  uint32_t* parts;      // [blocks, kThreads] room
  uint32_t* sums;       // [blocks] room
  unsigned int* count;  // zero
  uint32_t* out;        // [2]: the sum of all, twice: of the last block, and after a grid barrier
};

template <Fault kFault>
__global__ void __launch_bounds__(kThreads) fault_kernel(const __grid_constant__ Args a) {
  __shared__ uint32_t shared[kThreads];
  __shared__ uint32_t last;
  const uint32_t me = threadIdx.x, lane = me % 32;
  const uint32_t* mine = a.in + (blockIdx.x * kThreads + me) * 4;
  const uint4 v = *reinterpret_cast<const uint4*>(mine + (kFault == Fault::kVector ? 1 : 0));
  if (kFault != Fault::kUnsetShared || me != 7) shared[me] = v.x + v.y + v.z + v.w;
  if (kFault != Fault::kBarrier) __syncthreads();
  uint32_t sum = shared[kThreads - 1 - me];
#pragma unroll
  for (int offset = 16; offset; offset /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, kFault == Fault::kLane && offset == 8 ? 7 : offset);
  __syncthreads();
  shared[me] = sum;  // the first lane's is the warp's
  if (kFault != Fault::kWarpBarrier) __syncwarp();
  sum = shared[me / 32 * 32] + lane;
  if (kFault != Fault::kUnsetWord || me != 5) a.parts[blockIdx.x * kThreads + me] = sum - lane;
  __syncthreads();
  if (me == 0) {
    uint32_t total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += a.parts[blockIdx.x * kThreads + 32 * w + (w == 0 ? 5 : 0)];
    a.sums[blockIdx.x] = total;
    if (kFault != Fault::kFence) __threadfence();
    last = atomicAdd(a.count, 1u) + 1 == gridDim.x;
    if (last) {
      __threadfence();
      uint32_t all = 0;
      for (uint32_t b = 0; b < gridDim.x; ++b) all += a.sums[b];
      a.out[0] = all;
    }
  }
  if (kFault != Fault::kGridBarrier) cooperative_groups::this_grid().sync();
  if (blockIdx.x == 0 && me == 0) {
    uint32_t all = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b) all += a.sums[b];
    a.out[1] = all;
  }
}

using Kernel = void (*)(Args);
[[maybe_unused]] const Kernel kernels[] = {
    fault_kernel<Fault::kNone>,        fault_kernel<Fault::kBarrier>,     fault_kernel<Fault::kWarpBarrier>,
    fault_kernel<Fault::kFence>,       fault_kernel<Fault::kGridBarrier>, fault_kernel<Fault::kVector>,
    fault_kernel<Fault::kUnsetShared>, fault_kernel<Fault::kUnsetWord>,   fault_kernel<Fault::kLane>};

}  // namespace

#if !defined(__CUDACC__)
#include <numeric>
#include <vector>

// Runs the kernel with a fault on a few blocks; 1 where the sums are right, 0 where not, -1 where it did not start.
extern "C" int dimap_run_fault(int fault, int blocks, int threads, int dynamic) {
  const size_t count = size_t(blocks) * kThreads * 4;
  std::vector<uint32_t> in(count + 4);
  for (size_t i = 0; i < count; ++i) in[i] = static_cast<uint32_t>(i * 7 % 1001);
  std::vector<uint32_t> parts(static_cast<size_t>(blocks) * kThreads), sums(static_cast<size_t>(blocks)), out(2);
  unsigned int counter = 0;
  emulator::mark(parts.data(), 4 * parts.size(), true);
  emulator::mark(sums.data(), 4 * sums.size(), true);
  const Args args{in.data(), parts.data(), sums.data(), &counter, out.data()};
  cudaLaunchAttribute attribute{cudaLaunchAttributeCooperative, {1}};
  const cudaLaunchConfig_t config{
      dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(dynamic), nullptr, &attribute, 1};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernels[fault], args);
  emulator::forget_marks();
  if (error != cudaSuccess) return -1;
  const uint32_t want = std::accumulate(in.begin(), in.end(), 0u);
  return out[0] == want && out[1] == want;
}
#endif
